//! The virtio-vsock packet header (virtio 1.2, 5.10.6), and nothing else.
//!
//! The header is decoded once into a value; the guest may change its memory afterwards, but not what we decided on.

/// Size of a header on the wire.
pub(crate) const HEADER_LEN: usize = 44;
/// The most payload that one packet may carry; Linux sends no more.
pub(crate) const MAX_PAYLOAD: usize = 64 * 1024;
/// The host's context id.
pub(crate) const HOST_CID: u64 = 2;
/// The only socket type served.
pub(crate) const TYPE_STREAM: u16 = 1;
/// SHUTDOWN flag: the sender will receive no more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender will send no more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;
/// Both SHUTDOWN flags.
pub(crate) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    /// Open a connection.
    Request = 1,
    /// Accept a connection.
    Response = 2,
    /// Refuse or end a connection.
    Reset = 3,
    /// End one or both directions.
    Shutdown = 4,
    /// Carry data.
    Rw = 5,
    /// Tell the free buffer space.
    CreditUpdate = 6,
    /// Ask for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number.
    pub(crate) fn from_wire(op: u16) -> Option<Self> {
        const ALL: [Op; 7] =
            [Op::Request, Op::Response, Op::Reset, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest];
        ALL.into_iter().find(|known| *known as u16 == op)
    }
}

/// A decoded header; fields are named as in the specification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    /// Sender.
    pub(crate) src_cid: u64,
    /// Receiver.
    pub(crate) dst_cid: u64,
    /// Port of the sender.
    pub(crate) src_port: u32,
    /// Port of the receiver.
    pub(crate) dst_port: u32,
    /// Bytes of payload that follow.
    pub(crate) len: u32,
    /// Socket type.
    pub(crate) kind: u16,
    /// Operation, as received: may be unknown.
    pub(crate) op: u16,
    /// Flags of the operation.
    pub(crate) flags: u32,
    /// Size of the sender's receive buffer.
    pub(crate) buf_alloc: u32,
    /// Bytes the sender has taken from that buffer so far, wrapping.
    pub(crate) fwd_cnt: u32,
}

impl Header {
    /// From the wire.
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// To the wire.
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_layout_of_the_specification() {
        let mut bytes = [0u8; HEADER_LEN];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap() + 1;
        }
        let header = Header::decode(&bytes);
        assert_eq!(header.src_cid, 0x0807_0605_0403_0201);
        assert_eq!(header.src_port, 0x1413_1211);
        assert_eq!(header.kind, 0x1e1d);
        assert_eq!(header.op, 0x201f);
        assert_eq!(header.fwd_cnt, 0x2c2b_2a29);
        assert_eq!(header.encode(), bytes);
    }

    #[test]
    fn unknown_operations_are_not_guessed() {
        assert_eq!(Op::from_wire(5), Some(Op::Rw));
        for op in [0, 8, 9, 0xffff] {
            assert_eq!(Op::from_wire(op), None);
        }
    }
}
