//! An HTTP proxy in a network namespace: the only way to what it forwards to.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A running proxy. It lives as long as the program.
pub struct Proxy {
    /// Its port on the namespace's loopback interface.
    pub port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    /// Starts one in the network namespace of the process `pid`; whatever is asked for comes from port `upstream`
    /// of the loopback interface there. No tunnels: who asks for one is refused.
    pub fn start(pid: u32, upstream: u16) -> Result<Self> {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, (ready, started)) = (requests.clone(), sync_channel(1));
        // Sockets belong to the namespace that the thread is in when it makes them.
        std::thread::spawn(move || {
            let listen = || -> Result<TcpListener> {
                let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(TcpListener::bind("127.0.0.1:0")?)
            };
            let listener = match listen() {
                Ok(listener) => listener,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let port = listener.local_addr().map(|address| address.port()).map_err(Into::into);
            if ready.send(port).is_err() {
                return;
            }
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)) else { continue };
                let seen = seen.clone();
                std::thread::spawn(move || drop(serve(client, server, &seen)));
            }
        });
        let port = started.recv().context("the proxy's thread ended")?.context("starting a proxy")?;
        Ok(Proxy { port, requests })
    }

    /// First lines of what was asked for, one for each connection.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn serve(mut client: TcpStream, mut server: TcpStream, seen: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while !head.contains(&b'\n') {
        let count = client.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..count]);
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    let tunnel = line.starts_with("CONNECT");
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    if tunnel {
        return client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    // Servers understand requests that name the whole address, so nothing needs to be rewritten.
    server.write_all(&head)?;
    let (mut answers, mut to_client) = (server.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || {
        drop(std::io::copy(&mut answers, &mut to_client));
        drop(to_client.shutdown(Shutdown::Both));
    });
    drop(std::io::copy(&mut client, &mut server));
    server.shutdown(Shutdown::Both)
}
