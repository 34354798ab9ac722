//! A TCP proxy on loopback before the registry: it counts what the registry sends, the same way for all.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

/// A running proxy. It lives as long as the program.
pub struct Proxy {
    /// Address of the proxy, `HOST:PORT`.
    pub address: String,
    seen: Arc<Seen>,
}

/// Bytes that went through since the last [`Proxy::take`].
#[derive(Default)]
struct Seen {
    bytes: AtomicU64,
    blobs: Mutex<BTreeSet<String>>,
}

impl Proxy {
    /// Starts to forward to `upstream`.
    pub fn start(upstream: String) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listening on loopback")?;
        let address = listener.local_addr()?.to_string();
        let seen = Arc::new(Seen::default());
        let shared = seen.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&upstream) else { continue };
                let (Ok(from_client), Ok(to_client)) = (client.try_clone(), client.try_clone()) else { continue };
                let (Ok(to_server), Ok(from_server)) = (server.try_clone(), server.try_clone()) else { continue };
                let (requests, answers) = (shared.clone(), shared.clone());
                std::thread::spawn(move || {
                    let mut heads = Vec::new();
                    forward(from_client, to_server, |data| requests.requests(&mut heads, data));
                });
                std::thread::spawn(move || {
                    forward(from_server, to_client, |data| {
                        answers.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                    });
                });
            }
        });
        Ok(Self { address, seen })
    }

    /// Bytes that the registry sent, and digests of the blobs that it was asked for, since the last call.
    pub fn take(&self) -> (u64, BTreeSet<String>) {
        let bytes = self.seen.bytes.swap(0, Ordering::Relaxed);
        (bytes, std::mem::take(&mut *self.seen.blobs.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Seen {
    /// Notes the blobs in request lines; `rest` keeps a head that has not come whole.
    fn requests(&self, rest: &mut Vec<u8>, data: &[u8]) {
        rest.extend_from_slice(data);
        while let Some(end) = rest.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&rest[..end]).into_owned();
            rest.drain(..end + 4);
            let mut words = head.lines().next().unwrap_or_default().split(' ');
            if let (Some("GET"), Some(path)) = (words.next(), words.next())
                && let Some((_, digest)) = path.rsplit_once("/blobs/")
            {
                self.blobs.lock().unwrap_or_else(PoisonError::into_inner).insert(digest.to_owned());
            }
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, mut note: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 256 * 1024];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || to.write_all(&buffer[..count]).is_err() {
            break;
        }
        note(&buffer[..count]);
    }
    // A client that has gone must not keep the registry sending.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_of_requests_in_pieces() {
        let (seen, mut rest) = (Seen::default(), Vec::new());
        let text = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\nGET /v2/a/b/blobs/sha256:12 HTTP/1.1\r\n\r\n\
                     HEAD /v2/a/b/blobs/sha256:34 HTTP/1.1\r\n\r\nGET /v2/a/b/blobs/sha256:56 HTTP/1.1\r\n";
        for piece in text.chunks(7) {
            seen.requests(&mut rest, piece);
        }
        assert_eq!(
            seen.blobs.lock().ok().map(|blobs| blobs.iter().cloned().collect()),
            Some(vec!["sha256:12".to_owned()])
        );
        seen.requests(&mut rest, b"\r\n");
        assert_eq!(seen.blobs.lock().ok().map(|blobs| blobs.len()), Some(2));
    }
}
