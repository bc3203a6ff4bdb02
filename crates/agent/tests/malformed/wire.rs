//! ttrpc by hand: frames of any kind, and what comes back.

use std::{path::Path, time::Duration};

use bulkhead_protocol::protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use ttrpc::{Code, Request, Response};

/// The largest body that is taken.
pub(crate) const LARGEST: usize = 4 << 20;
/// The message type of a request.
pub(crate) const REQUEST: u8 = 1;
/// No answer takes this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A frame: header and body.
pub(crate) fn frame(stream: u32, kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [&header(length, stream, kind, flags), body].concat()
}

/// A header alone.
pub(crate) fn header(length: u32, stream: u32, kind: u8, flags: u8) -> Vec<u8> {
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, flags]].concat()
}

/// The envelope of a request.
pub(crate) fn envelope(service: &str, method: &str, payload: Vec<u8>, limit: Duration) -> Vec<u8> {
    let request = Request {
        service: service.into(),
        method: method.into(),
        timeout_nano: i64::try_from(limit.as_nanos()).unwrap(),
        payload,
        ..Default::default()
    };
    request.write_to_bytes().unwrap()
}

/// The frame of a request to the agent's service.
pub(crate) fn request(stream: u32, method: &str, message: &impl Message) -> Vec<u8> {
    let body = envelope("grpc.AgentService", method, message.write_to_bytes().unwrap(), Duration::ZERO);
    frame(stream, REQUEST, 0, &body)
}

/// A connection without manners.
pub(crate) struct Wire(UnixStream);

impl Wire {
    pub(crate) async fn connect(socket: &Path) -> Wire {
        Wire(UnixStream::connect(socket).await.unwrap())
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.0.write_all(bytes)).await.expect("the agent reads no more").unwrap();
    }

    /// The next answer: its stream, its code and its text.
    pub(crate) async fn answer(&mut self) -> (u32, Code, String) {
        timeout(PATIENCE, self.read()).await.expect("no answer")
    }

    async fn read(&mut self) -> (u32, Code, String) {
        let length = self.0.read_u32().await.expect("the agent hung up");
        let stream = self.0.read_u32().await.unwrap();
        let mut rest = vec![0; usize::try_from(length).unwrap() + 2];
        self.0.read_exact(&mut rest).await.unwrap();
        assert_eq!(rest[0], 2, "an answer is a response");
        let status = Response::parse_from_bytes(&rest[2..]).unwrap().status.unwrap_or_default();
        (stream, status.code(), status.message)
    }

    /// Sends one frame and asserts what it comes to; the text.
    pub(crate) async fn refused(&mut self, bytes: &[u8], stream: u32, code: Code) -> String {
        self.send(bytes).await;
        let (of, got, text) = self.answer().await;
        assert_eq!((of, got), (stream, code), "{text}");
        text
    }

    /// Asks for health over this connection.
    pub(crate) async fn check(&mut self) {
        let body = envelope("grpc.Health", "Check", Vec::new(), Duration::ZERO);
        self.send(&frame(0x7fff_ffff, REQUEST, 0, &body)).await;
        let (stream, code, text) = self.answer().await;
        assert_eq!((stream, code), (0x7fff_ffff, Code::OK), "{text}");
    }
}
