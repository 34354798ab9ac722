//! The transport for PID 1's private socket.
//!
//! On the private socket, systemd sets the header field SENDER to its well-known name. The D-Bus specification allows only
//! unique names in this field, and zbus refuses the message. This transport therefore replaces the text of the field by a
//! unique name of the same length before zbus reads the message. All other bytes are unchanged.
//!
//! Format: D-Bus specification, "Authentication Protocol" and "Message Format".

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use zbus::Connection;
use zbus::connection::Builder;
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};
use zbus::export::async_trait::async_trait;

/// Length of the fixed part of a message header, in bytes.
const FIXED: usize = 16;
/// Largest message that the specification allows, 128 MiB.
const LARGEST: usize = 1 << 27;
/// Time limit for connecting, so that the agent does not hang if PID 1 does.
const CONNECT: Duration = Duration::from_secs(10);
/// Code of the header field SENDER.
const SENDER: u8 = 7;

/// Connects to `path` as the caller's user. `finish` configures the builder before the connection is built.
///
/// # Errors
/// `UnexpectedEof` if PID 1 closes the connection before it answers, `PermissionDenied` if it refuses the authentication,
/// `TimedOut` after [`CONNECT`].
pub(super) async fn connect(path: &Path, finish: impl FnOnce(Builder<'_>) -> Builder<'_>) -> io::Result<Connection> {
    tokio::time::timeout(CONNECT, unlimited(path, finish))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", CONNECT.as_secs())))?
}

async fn unlimited(path: &Path, finish: impl FnOnce(Builder<'_>) -> Builder<'_>) -> io::Result<Connection> {
    let (read, mut write) = UnixStream::connect(path).await?.into_split();
    let mut read = BufReader::new(read);
    // EXTERNAL expects the decimal uid as text, encoded in hexadecimal.
    let uid = hex::encode(rustix::process::geteuid().as_raw().to_string());
    // BEGIN is sent together with AUTH, as sd-bus does. If it were sent separately, systemd could read it together with
    // the first message, which it would then answer only after the next one arrives.
    write.write_all(format!("\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n").as_bytes()).await?;
    let mut answer = String::new();
    if read.read_line(&mut answer).await? == 0 {
        // PID 1 closes unanswered connections when it re-executes itself.
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "connection closed before the authentication"));
    }
    let Some(guid) = answer.trim_end().strip_prefix("OK ") else {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("authentication refused: {}", answer.trim_end()),
        ));
    };
    let socket = PrivateSocket(Reader { stream: read, message: Vec::new(), given: 0 }, Writer(write));
    finish(Builder::authenticated_socket(socket, guid).p2p()).build().await.map_err(io::Error::other)
}

/// The socket's halves, as zbus expects them.
struct PrivateSocket(Reader, Writer);

impl Socket for PrivateSocket {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        Split::new(self.0, self.1)
    }
}

#[derive(Debug)]
struct Reader {
    stream: BufReader<OwnedReadHalf>,
    /// The message that zbus is reading.
    message: Vec<u8>,
    /// Number of its bytes that zbus has read.
    given: usize,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        if self.given == self.message.len() {
            let mut message = vec![0; FIXED];
            if let Err(error) = self.stream.read_exact(&mut message).await {
                // End of input between two messages is a regular end of the connection.
                return if error.kind() == io::ErrorKind::UnexpectedEof { Ok((0, Vec::new())) } else { Err(error) };
            }
            let total = total_length(&message)?;
            message.resize(total, 0);
            self.stream.read_exact(&mut message[FIXED..]).await?;
            replace_sender(&mut message);
            self.message = message;
            self.given = 0;
        }
        let rest = &self.message[self.given..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.given += count;
        Ok((count, Vec::new()))
    }
}

#[derive(Debug)]
struct Writer(OwnedWriteHalf);

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, buffer: &[u8], _fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.0.write(buffer).await
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.0.flush().await
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}

/// Reads a 32-bit number at offset `at`, in the byte order of the message.
fn number(message: &[u8], at: usize) -> Option<usize> {
    let bytes: [u8; 4] = message.get(at..at + 4)?.try_into().ok()?;
    let value = if message.first() == Some(&b'B') { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
    usize::try_from(value).ok()
}

/// Returns the length in bytes of the message with this fixed header part.
fn total_length(fixed: &[u8]) -> io::Result<usize> {
    let body = number(fixed, 4);
    let fields = number(fixed, 12);
    body.zip(fields)
        .map(|(body, fields)| FIXED + fields.next_multiple_of(8) + body)
        .filter(|total| *total <= LARGEST)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "message longer than D-Bus allows"))
}

/// Replaces the text of the field SENDER by a unique name of the same length, unless it is already a unique name.
fn replace_sender(message: &mut [u8]) {
    let Some(range) = sender(message) else { return };
    let text = &mut message[range];
    if text.len() >= 4 && text[0] != b':' {
        text.fill(b'0');
        text[..3].copy_from_slice(b":1.");
    }
}

/// Returns the position of the text of the field SENDER. `None` if the field is missing or the header is malformed, which
/// zbus reports.
fn sender(message: &[u8]) -> Option<std::ops::Range<usize>> {
    let end = FIXED.checked_add(number(message, 12)?)?;
    let mut at = FIXED;
    while at < end {
        // A field is its code and a variant: the signature (length, one type, NUL) and the value.
        let code = *message.get(at)?;
        let &[1, kind, 0] = message.get(at + 1..at + 4)? else { return None };
        let value = at + 4;
        let next = match kind {
            b's' | b'o' => {
                let length = number(message, value)?;
                if code == SENDER {
                    message.get(value + 4..value + 4 + length)?;
                    return Some(value + 4..value + 4 + length);
                }
                value + 4 + length + 1
            }
            b'g' => value + 1 + usize::from(*message.get(value)?) + 1,
            b'u' => value + 4,
            _ => return None,
        };
        at = next.next_multiple_of(8);
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use proptest::prelude::*;

    fn message(sender: &str) -> Vec<u8> {
        // zbus builds a valid message with a unique name of the same length, which is then overwritten by `sender`.
        let unique = format!(":1.{}", "9".repeat(sender.len() - 3));
        let message = zbus::Message::signal("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "JobNew")
            .sender(unique.as_str())
            .build(&("org.freedesktop.systemd1", 7_u32))
            .unwrap();
        let mut bytes = message.data().to_vec();
        let at = bytes.windows(unique.len()).position(|window| window == unique.as_bytes()).unwrap();
        bytes[at..at + sender.len()].copy_from_slice(sender.as_bytes());
        bytes
    }

    #[test]
    fn only_the_sender_is_replaced() {
        let before = message("org.freedesktop.systemd1");
        assert_eq!(total_length(&before[..FIXED]).unwrap(), before.len());
        let mut after = before.clone();
        replace_sender(&mut after);
        let range = sender(&before).unwrap();
        assert_eq!(&after[range.clone()], b":1.000000000000000000000");
        assert_eq!(after[..range.start], before[..range.start]);
        assert_eq!(after[range.end..], before[range.end..], "the same text in the body is unchanged");
    }

    #[test]
    fn a_unique_name_is_kept() {
        let before = message(":1.4711");
        let mut after = before.clone();
        replace_sender(&mut after);
        assert_eq!(after, before);
    }

    /// Returns a message with these header fields, and the position of the text of the field SENDER.
    fn with_fields(fields: &[(u8, u8, String)], big: bool) -> (Vec<u8>, Option<std::ops::Range<usize>>) {
        let number = |value: usize| if big { (value as u32).to_be_bytes() } else { (value as u32).to_le_bytes() };
        let mut bytes = vec![0; FIXED];
        bytes[0] = if big { b'B' } else { b'l' };
        let mut range = None;
        for (code, kind, text) in fields {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend([*code, 1, *kind, 0]);
            match kind {
                b'u' => bytes.extend(number(7)),
                b'g' => bytes.push(u8::try_from(text.len()).unwrap()),
                _ => bytes.extend(number(text.len())),
            }
            if *kind != b'u' {
                range = range.or((*code == SENDER).then(|| bytes.len()..bytes.len() + text.len()));
                bytes.extend(text.bytes().chain([0]));
            }
        }
        let length = number(bytes.len() - FIXED);
        bytes[12..FIXED].copy_from_slice(&length);
        (bytes, range)
    }

    /// Sends two messages in one write, as PID 1 does.
    #[tokio::test]
    async fn messages_are_received_with_a_unique_sender() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("private");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let peer = tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            for expected in ["\0AUTH EXTERNAL ", "BEGIN"] {
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                assert!(line.starts_with(expected), "{line}");
            }
            stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").await.unwrap();
            stopped.await.unwrap();
            stream.write_all(&message("org.freedesktop.systemd1").repeat(2)).await.unwrap();
        });
        let connection = connect(&path, |builder| builder).await.unwrap();
        let mut messages = zbus::MessageStream::from(&connection);
        stop.send(()).unwrap();
        for _ in 0..2 {
            let message = messages.next().await.unwrap().unwrap();
            assert_eq!(message.header().sender().unwrap(), ":1.000000000000000000000");
            assert_eq!(message.body().deserialize::<(String, u32)>().unwrap(), ("org.freedesktop.systemd1".into(), 7));
        }
        peer.await.unwrap();
    }

    #[tokio::test]
    async fn a_closed_connection_is_not_a_refusal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("private");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let (connected, accepted) = tokio::join!(connect(&path, |builder| builder), async {
            let (mut stream, _) = listener.accept().await?;
            // Unread input would turn the close into a reset.
            let mut greeting = [0; 64];
            stream.read(&mut greeting).await.map(drop)
        });
        accepted.unwrap();
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        /// The field is found at any position and in both byte orders. The same bytes in the body are not taken for it.
        #[test]
        fn the_sender_is_found(
            texts in proptest::collection::vec("[a-z]{0,20}", 4),
            order in Just([(1, b'o'), (5, b'u'), (8, b'g'), (SENDER, b's')]).prop_shuffle(),
            big: bool,
        ) {
            let mut fields: Vec<_> = order.iter().zip(texts).map(|(&(code, kind), text)| (code, kind, text)).collect();
            let (message, range) = with_fields(&fields, big);
            prop_assert_eq!(sender(&message), range);
            let body = with_fields(&fields, big).0.split_off(FIXED);
            fields.retain(|(code, ..)| *code != SENDER);
            let mut other = with_fields(&fields, big).0;
            other.resize(other.len().next_multiple_of(8), 0);
            other.extend(body);
            prop_assert_eq!(sender(&other), None);
        }

        #[test]
        fn malformed_headers_do_not_panic(mut bytes in proptest::collection::vec(any::<u8>(), FIXED..200)) {
            let _ = total_length(&bytes[..FIXED]);
            let length = bytes.len();
            replace_sender(&mut bytes);
            prop_assert_eq!(bytes.len(), length);
        }
    }
}
