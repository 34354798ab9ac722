//! A small cluster client: enough of `oc` to be a real program that talks to a real server.
//!
//! `oc version [--client]`, `oc get --raw PATH`, `oc status`; `--server http://HOST:PORT` names the server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

const DEFAULT_SERVER: &str = "http://127.0.0.1:10248";

fn get(server: &str, path: &str) -> Result<String, String> {
    let address = server.strip_prefix("http://").ok_or_else(|| format!("not an http:// server: {server}"))?;
    let mut stream = TcpStream::connect(address).map_err(|e| format!("The connection to the server {address} was refused: {e}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|e| e.to_string())?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").map_err(|e| e.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the server's answer has no body")?;
    match head.lines().next().unwrap_or_default() {
        status if status.contains(" 200 ") => Ok(body.to_string()),
        status => Err(format!("Error from server: {status}")),
    }
}

fn run(args: &[String]) -> Result<(), String> {
    let mut server = DEFAULT_SERVER.to_string();
    let mut words = Vec::new();
    let (mut raw, mut client) = (None, false);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--server" => server = rest.next().ok_or("--server wants a value")?.clone(),
            "--raw" => raw = Some(rest.next().ok_or("--raw wants a path")?.clone()),
            "--client" => client = true,
            word if !word.starts_with('-') => words.push(word),
            other => return Err(format!("unknown flag: {other}")),
        }
    }
    match words.as_slice() {
        ["version"] => {
            println!("Client Version: {}", option_env!("CLUSTER_VERSION").unwrap_or("unknown"));
            if !client {
                println!("Server Version: {}", get(&server, "/version")?.trim());
            }
        }
        ["get"] => print!("{}", get(&server, &raw.ok_or("get wants --raw PATH")?)?),
        ["status"] => println!("node at {server}: {}", get(&server, "/healthz")?.trim()),
        _ => return Err("usage: oc version [--client] | get --raw PATH | status  [--server http://HOST:PORT]".into()),
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
