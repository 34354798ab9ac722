//! A small node agent: a real service of the node image. Answers HTTP, tells systemd when it is ready, runs until stopped.
//!
//! `kubelet --config FILE` serves /healthz and /version on the address in FILE;
//! `kubelet hello --listen ADDRESS` is node-hello.service: says what it runs on.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;

const VERSION: &str = match option_env!("CLUSTER_VERSION") {
    Some(version) => version,
    None => "unknown",
};

fn notify(state: &str) {
    // Without NOTIFY_SOCKET, an administrator runs the program by hand, and no service manager waits.
    if let (Some(path), Ok(socket)) = (std::env::var_os("NOTIFY_SOCKET"), UnixDatagram::unbound()) {
        let _ = socket.send_to(state.as_bytes(), path);
    }
}

fn os_name() -> String {
    let text = std::fs::read_to_string("/usr/lib/os-release").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or("unknown");
    name.trim_matches('"').to_string()
}

fn answer(stream: TcpStream, respond: &dyn Fn(&str) -> Option<String>) -> std::io::Result<()> {
    let mut lines = BufReader::new(&stream).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    // To the end of the head: closing with unread data would reset the connection, and the answer be lost.
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let path = request.split_whitespace().nth(1).unwrap_or("/");
    let (status, body) = match respond(path) {
        Some(body) => ("200 OK", body),
        None => ("404 Not Found", "no such page\n".to_string()),
    };
    write!(&stream, "HTTP/1.0 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn serve(address: &str, respond: &dyn Fn(&str) -> Option<String>) -> std::io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("serving on {address}");
    notify("READY=1");
    for stream in listener.incoming() {
        if let Err(error) = stream.and_then(|s| answer(s, respond)) {
            eprintln!("request failed: {error}");
        }
    }
    Ok(())
}

fn value_of(args: &[String], flag: &str, default: &str) -> String {
    let at = args.iter().position(|a| a == flag);
    at.and_then(|i| args.get(i + 1)).cloned().unwrap_or_else(|| default.to_string())
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--version") {
        println!("Kubernetes {VERSION}");
        return Ok(());
    }
    if args.first().is_some_and(|a| a == "hello") {
        let text = format!("hello from {} {VERSION}\n", os_name());
        return serve(&value_of(&args, "--listen", "127.0.0.1:8080"), &|_| Some(text.clone()));
    }
    let config = std::fs::read_to_string(value_of(&args, "--config", "/etc/kubernetes/kubelet.conf"))?;
    let address = config.lines().find_map(|l| l.strip_prefix("healthz=")).unwrap_or("127.0.0.1:10248");
    serve(address, &|path| match path {
        "/healthz" => Some("ok\n".into()),
        "/version" => Some(format!("{VERSION} on {}\n", os_name())),
        _ => None,
    })
}
