//! A registry behind a proxy that misbehaves, once or always, on the requests that a test plans.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Fault of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Half of the body, then silence.
    Stall,
    /// Half of the body, then the connection is reset.
    Reset,
    /// Half of the body, then a proper end of the connection.
    Cut,
    /// Half of the body, and a second later the rest.
    Late,
    /// A byte in the middle of the body is another one.
    Corrupt,
    /// This answer instead.
    Answer(u16, &'static str),
}

/// The proxy; ends with the test program.
pub struct Faults {
    pub address: String,
    plan: Arc<Mutex<Plan>>,
    /// Requests for blobs that were answered whole, by digest.
    served: Arc<Mutex<Vec<String>>>,
    pub hits: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Plan {
    path: String,
    fault: Option<Fault>,
    times: usize,
}

impl Faults {
    /// In front of the registry at `upstream`.
    pub fn before(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let faults = Self { address, plan: Arc::default(), served: Arc::default(), hits: Arc::default() };
        let (plan, served, hits) = (faults.plan.clone(), faults.served.clone(), faults.hits.clone());
        let upstream = upstream.to_owned();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (plan, served, hits, upstream) = (plan.clone(), served.clone(), hits.clone(), upstream.clone());
                std::thread::spawn(move || {
                    // A client may go away in the middle.
                    let _ = serve(client, &upstream, &plan, &served, &hits);
                });
            }
        });
        faults
    }

    /// From now on, the next `times` requests whose path contains `path` meet `fault`.
    pub fn plan(&self, path: &str, fault: Fault, times: usize) {
        *self.plan.lock().unwrap() = Plan { path: path.to_owned(), fault: Some(fault), times };
        self.hits.store(0, Ordering::SeqCst);
    }

    /// The blobs that were served whole since this was asked last.
    pub fn served(&self) -> Vec<String> {
        std::mem::take(&mut *self.served.lock().unwrap())
    }
}

/// One request per connection: both sides get `Connection: close`.
fn serve(
    mut client: TcpStream,
    upstream: &str,
    plan: &Mutex<Plan>,
    served: &Mutex<Vec<String>>,
    hits: &AtomicUsize,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && client.read(&mut byte)? == 1 {
        request.push(byte[0]);
        // A TLS handshake: skopeo tries that first.
        if request[0] == 0x16 {
            return client.shutdown(Shutdown::Both);
        }
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let path = text.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let fault = {
        let mut plan = plan.lock().unwrap();
        let meets = plan.times > 0 && path.contains(&plan.path);
        plan.times -= usize::from(meets);
        plan.fault.filter(|_| meets)
    };
    if fault.is_some() {
        hits.fetch_add(1, Ordering::SeqCst);
    }
    if let Some(Fault::Answer(status, headers)) = fault {
        let answer = format!("HTTP/1.1 {status} Because\r\n{headers}Content-Length: 0\r\nConnection: close\r\n\r\n");
        return client.write_all(answer.as_bytes());
    }
    let mut server = TcpStream::connect(upstream)?;
    let forwarded = text.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    server.write_all(forwarded.as_bytes())?;
    let mut response = Vec::new();
    server.read_to_end(&mut response)?;
    let head = response.windows(4).position(|four| four == b"\r\n\r\n").map_or(response.len(), |at| at + 4);
    let middle = head + (response.len() - head) / 2;
    if matches!(fault, None | Some(Fault::Late)) {
        client.write_all(&response[..middle])?;
        if fault.is_some() {
            std::thread::sleep(Duration::from_secs(1));
        }
        // Before the last byte: the test asks as soon as the pull has that.
        if let Some((_, digest)) = path.split_once("/blobs/") {
            served.lock().unwrap().push(digest.to_owned());
        }
        client.write_all(&response[middle..])?;
        return client.shutdown(Shutdown::Write);
    }
    match fault {
        Some(Fault::Corrupt) => {
            response[middle] ^= 0xff;
            client.write_all(&response)
        }
        Some(Fault::Cut) => client.write_all(&response[..middle]),
        Some(Fault::Reset) => {
            client.write_all(&response[..middle])?;
            // Unread input makes closing a reset; zero linger time does it without.
            rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
            Ok(())
        }
        Some(Fault::Stall | Fault::Late | Fault::Answer(..)) | None => {
            client.write_all(&response[..middle])?;
            // The client is the one that gives up.
            client.set_read_timeout(Some(Duration::from_secs(30)))?;
            client.read(&mut [0]).map(drop)
        }
    }
}
