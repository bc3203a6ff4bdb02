//! How a host process reaches a port of the guest: three transports, one dial, one retry policy.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_vsock::{VsockAddr, VsockStream};

use crate::Error;

/// How long a hybrid socket may take to answer one `CONNECT`. Before the guest's driver is up it does not answer at all.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The answer `OK <n>\n` with the largest number, and then some.
const ANSWER_BYTES: usize = 32;
/// The pause after the first refused attempt; doubled after each up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_millis(40);

/// A byte stream to a guest port.
pub type Connection = Box<dyn Stream>;

/// What a [`Connection`] can do.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// How the guest's ports are reached; kept in state files, so that any process of the same user can dial.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Endpoint {
    /// The kernel's vsock.
    Vsock {
        /// The guest's context id.
        cid: u32,
    },
    /// A unix socket that takes `CONNECT <port>\n` and answers `OK <n>\n`.
    Hybrid {
        /// The socket.
        path: PathBuf,
    },
    /// An agent that runs as a plain process: its unix socket, whatever the port.
    Unix {
        /// The socket.
        path: PathBuf,
    },
}

impl Endpoint {
    /// One attempt to reach `port`. A guest that does not listen (yet) is [`Error::NotListening`].
    pub async fn dial(&self, port: u32) -> Result<Connection, Error> {
        match self {
            Endpoint::Vsock { cid } => match VsockStream::connect(VsockAddr::new(*cid, port)).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) if may_come_up(&error) => Err(Error::NotListening { port }),
                Err(error) => Err(Error::io(format!("connect to vsock {cid}:{port}"))(error)),
            },
            Endpoint::Hybrid { path } => Ok(Box::new(dial_hybrid(path, port).await?)),
            Endpoint::Unix { path } => match UnixStream::connect(path).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
                {
                    Err(Error::NotListening { port })
                }
                Err(error) => Err(Error::io(format!("connect to {}", path.display()))(error)),
            },
        }
    }

    /// Dials until somebody listens, at most `bound`; the one retry policy of the product.
    ///
    /// Any failure but [`Error::NotListening`] ends it at once: a VM that is gone does not come back.
    pub async fn dial_within(&self, port: u32, bound: Duration) -> Result<Connection, Error> {
        let attempts = async {
            let mut pause = FIRST_PAUSE;
            loop {
                match self.dial(port).await {
                    Err(Error::NotListening { .. }) => sleep(pause).await,
                    done => break done,
                }
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        };
        timeout_at(Instant::now() + bound, attempts).await.unwrap_or_else(|_| {
            let what = format!("waiting for the guest to listen on vsock port {port}");
            Err(Error::Timeout { what, bound, last_words: String::new() })
        })
    }
}

/// Whether a vsock refusal is what a guest that still boots gives: no listener (reset), no driver (timeout), no device yet.
fn may_come_up(error: &io::Error) -> bool {
    let boots = [libc::ECONNRESET, libc::ECONNREFUSED, libc::ETIMEDOUT, libc::ENODEV, libc::EHOSTUNREACH];
    error.raw_os_error().is_some_and(|errno| boots.contains(&errno))
}

/// Connects to a hybrid socket and asks for the port. The socket exists as long as its VM does, so failing to connect
/// means that the VM is gone.
async fn dial_hybrid(path: &Path, port: u32) -> Result<UnixStream, Error> {
    let stream = UnixStream::connect(path).await;
    let mut stream = stream.map_err(Error::io(format!("connect to the guest at {}", path.display())))?;
    match timeout(HANDSHAKE, handshake(&mut stream, port)).await {
        Ok(Ok(true)) => Ok(stream),
        Ok(Ok(false)) | Err(_) => Err(Error::NotListening { port }),
        Ok(Err(error)) => Err(Error::io(format!("ask {} for vsock port {port}", path.display()))(error)),
    }
}

/// Whether the guest accepted. Reads byte by byte, because what follows the answer is the guest's.
async fn handshake(stream: &mut UnixStream, port: u32) -> io::Result<bool> {
    let refused = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            Ok(false)
        }
        _ => Err(error),
    };
    if let Err(error) = stream.write_all(format!("CONNECT {port}\n").as_bytes()).await {
        return refused(error);
    }
    let mut answer = Vec::with_capacity(ANSWER_BYTES);
    while answer.len() < ANSWER_BYTES && answer.last() != Some(&b'\n') {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(error) => return refused(error),
        }
    }
    match answer.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n")) {
        Some(number) if !number.is_empty() && number.iter().all(u8::is_ascii_digit) => Ok(true),
        _ => {
            let answer = String::from_utf8_lossy(&answer);
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("unexpected answer {answer:?}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncBufReadExt, net::UnixListener};

    use super::*;

    /// A hybrid socket that gives one answer per connection, in turn, and then echoes.
    fn hybrid(answers: &'static [&'static str]) -> (tempfile::TempDir, Endpoint) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (reader, mut writer) = stream.split();
                let mut reader = tokio::io::BufReader::new(reader);
                let mut request = String::new();
                reader.read_line(&mut request).await.unwrap();
                assert_eq!(request, "CONNECT 1024\n");
                writer.write_all(answer.as_bytes()).await.unwrap();
                if answer.ends_with("hello") {
                    let mut rest = [0; 4];
                    reader.read_exact(&mut rest).await.unwrap();
                    writer.write_all(&rest).await.unwrap();
                }
            }
        });
        (dir, Endpoint::Hybrid { path })
    }

    #[tokio::test]
    async fn what_follows_the_answer_belongs_to_the_caller() {
        let (_dir, endpoint) = hybrid(&["OK 1073741824\nhello"]);
        let mut stream = endpoint.dial(1024).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "helloping");
    }

    #[tokio::test]
    async fn a_refusal_is_not_listening_and_is_retried() {
        let (_dir, endpoint) = hybrid(&["", "", "", "OK 5\nhello"]);
        assert!(matches!(endpoint.dial(1024).await, Err(Error::NotListening { port: 1024 })));
        endpoint.dial_within(1024, Duration::from_secs(5)).await.map(drop).unwrap();
    }

    #[tokio::test]
    async fn nonsense_is_an_error_at_once() {
        for answer in [&["NO\n"], &["OK \n"], &["OK x\n"], &["OK 11111111111111111111111111111111111111111"]]
        {
            let (_dir, endpoint) = hybrid(answer);
            let error = endpoint.dial_within(1024, Duration::from_secs(5)).await.map(drop).unwrap_err();
            assert!(error.to_string().contains("unexpected answer"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_hybrid_socket_that_is_gone_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Hybrid { path: dir.path().join("gone.sock") };
        let error = endpoint.dial_within(1024, Duration::from_secs(60)).await.map(drop).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_unix_socket_is_waited_for_and_the_wait_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let endpoint = Endpoint::Unix { path: path.clone() };
        let error = endpoint.dial_within(1024, Duration::from_millis(30)).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("port 1024 took longer than 30ms"), "{error}");

        let (dialed, _listener) = tokio::join!(endpoint.dial_within(1024, Duration::from_secs(5)), async {
            sleep(Duration::from_millis(20)).await;
            UnixListener::bind(&path).unwrap()
        });
        dialed.map(drop).unwrap();
    }

    #[test]
    fn it_survives_a_state_file() {
        let endpoint = Endpoint::Hybrid { path: "/run/x/vm/vsock.sock".into() };
        let text = serde_json::to_string(&endpoint).unwrap();
        assert_eq!(text, r#"{"kind":"hybrid","path":"/run/x/vm/vsock.sock"}"#);
        assert_eq!(serde_json::from_str::<Endpoint>(&text).unwrap(), endpoint);
    }
}
