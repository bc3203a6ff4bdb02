//! ttrpc frames out of a stream of bytes, however it is cut: 4 bytes of length, 4 of stream id, type, flags, payload.

use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MessageHeader};

/// A frame that has passed.
#[derive(Debug, PartialEq)]
pub(crate) struct Frame {
    /// Its header.
    pub(crate) header: MessageHeader,
    /// Its payload; `None` of a frame that is longer than a peer may send.
    pub(crate) payload: Option<Vec<u8>>,
}

/// One direction of a connection.
#[derive(Default)]
pub(crate) struct Frames {
    /// The beginning of a frame.
    partial: Vec<u8>,
    /// What is left of a frame that is too long to be kept.
    skipped: usize,
}

impl Frames {
    /// Takes the bytes that have passed, and gives the frames that are complete with them.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            if self.skipped > 0 {
                let passed = self.skipped.min(bytes.len());
                self.skipped -= passed;
                bytes = &bytes[passed..];
                continue;
            }
            self.fill(&mut bytes, MESSAGE_HEADER_LENGTH);
            if self.partial.len() < MESSAGE_HEADER_LENGTH {
                break;
            }
            let header = MessageHeader::from(&self.partial[..MESSAGE_HEADER_LENGTH]);
            let length = usize::try_from(header.length).unwrap_or(usize::MAX);
            if length > MESSAGE_LENGTH_MAX {
                self.partial.clear();
                self.skipped = length;
                frames.push(Frame { header, payload: None });
                continue;
            }
            self.fill(&mut bytes, MESSAGE_HEADER_LENGTH + length);
            if self.partial.len() == MESSAGE_HEADER_LENGTH + length {
                let payload = self.partial.split_off(MESSAGE_HEADER_LENGTH);
                self.partial.clear();
                frames.push(Frame { header, payload: Some(payload) });
            }
        }
        frames
    }

    /// Moves bytes until that many are there.
    fn fill(&mut self, bytes: &mut &[u8], wanted: usize) {
        let missing = wanted.saturating_sub(self.partial.len()).min(bytes.len());
        let (taken, rest) = bytes.split_at(missing);
        self.partial.extend_from_slice(taken);
        *bytes = rest;
    }
}

/// However bytes are cut, the same frames come out of them.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let whole = Frames::default().take(data);
    let mut frames = Frames::default();
    let cut: Vec<Frame> = data.chunks(7).flat_map(|chunk| frames.take(chunk)).collect();
    assert_eq!(whole, cut);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(stream: u32, payload: &[u8]) -> Vec<u8> {
        let header = MessageHeader::new_request(stream, u32::try_from(payload.len()).unwrap());
        [Vec::from(header), payload.to_vec()].concat()
    }

    #[test]
    fn frames_come_out_however_the_bytes_are_cut() {
        let long = vec![7; MESSAGE_LENGTH_MAX + 1];
        let all = [bytes(1, b"hello"), bytes(3, b""), bytes(5, &long), bytes(7, b"x")].concat();
        for cut in [1, 3, 10, 11, 4096, all.len()] {
            let mut frames = Frames::default();
            let seen: Vec<Frame> = all.chunks(cut).flat_map(|chunk| frames.take(chunk)).collect();
            let seen: Vec<_> =
                seen.iter().map(|frame| (frame.header.stream_id, frame.payload.as_deref())).collect();
            assert_eq!(seen, [(1, Some(&b"hello"[..])), (3, Some(b"")), (5, None), (7, Some(b"x"))], "{cut}");
        }
    }

    #[test]
    fn the_corpus_breaks_nothing() {
        for file in std::fs::read_dir("../../fuzz/corpus/recorded_frames").unwrap() {
            fuzz(&std::fs::read(file.unwrap().path()).unwrap());
        }
    }
}
