//! The little that has to be known of an ELF file: what its program headers say. 64-bit, little endian.

const INTERP: u32 = 3;
const NOTE: u32 = 4;

/// An ELF file by its program headers.
#[derive(Debug)]
pub struct Elf<'a> {
    data: &'a [u8],
    /// Type and content of each segment.
    segments: Vec<(u32, &'a [u8])>,
}

impl<'a> Elf<'a> {
    /// None if `data` is no 64-bit little-endian ELF file, or one that is cut short.
    pub fn parse(data: &'a [u8]) -> Option<Elf<'a>> {
        if !data.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let table = usize::try_from(u64_at(data, 32)?).ok()?;
        let (size, count) = (usize::from(u16_at(data, 54)?), usize::from(u16_at(data, 56)?));
        let mut segments = Vec::with_capacity(count);
        for index in 0..count {
            let header = data.get(table.checked_add(index * size)?..)?;
            let offset = usize::try_from(u64_at(header, 8)?).ok()?;
            let length = usize::try_from(u64_at(header, 32)?).ok()?;
            segments.push((u32_at(header, 0)?, data.get(offset..offset.checked_add(length)?)?));
        }
        Some(Elf { data, segments })
    }

    /// Whether running it takes a dynamic linker.
    pub fn needs_interpreter(&self) -> bool {
        self.segments.iter().any(|(kind, _)| *kind == INTERP)
    }

    /// Whether it has a note of this owner and type.
    pub fn has_note(&self, owner: &str, kind: u32) -> bool {
        self.segments
            .iter()
            .filter(|(segment, _)| *segment == NOTE)
            .any(|(_, notes)| notes_of(notes).any(|(name, note)| note == kind && name == owner.as_bytes()))
    }

    /// The whole file.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }
}

/// Owner (without its NUL) and type of each note: name size, content size, type, then both padded to four bytes.
fn notes_of(mut notes: &[u8]) -> impl Iterator<Item = (&[u8], u32)> {
    std::iter::from_fn(move || {
        let name_size = u32_at(notes, 0)? as usize;
        let content_size = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let name = notes.get(12..12usize.checked_add(name_size)?)?;
        let next = 12 + name_size.next_multiple_of(4) + content_size.next_multiple_of(4);
        notes = notes.get(next..).unwrap_or_default();
        Some((name.strip_suffix(&[0]).unwrap_or(name), kind))
    })
}

fn bytes_at<const N: usize>(data: &[u8], offset: usize) -> Option<[u8; N]> {
    data.get(offset..)?.first_chunk().copied()
}

fn u16_at(data: &[u8], offset: usize) -> Option<u16> {
    bytes_at(data, offset).map(u16::from_le_bytes)
}

pub(crate) fn u32_at(data: &[u8], offset: usize) -> Option<u32> {
    bytes_at(data, offset).map(u32::from_le_bytes)
}

fn u64_at(data: &[u8], offset: usize) -> Option<u64> {
    bytes_at(data, offset).map(u64::from_le_bytes)
}

/// Test data: an ELF file of these segments, each a type and a content.
#[cfg(test)]
pub(crate) fn sample(segments: &[(u32, &[u8])]) -> Vec<u8> {
    let mut file = vec![0; 64 + 56 * segments.len()];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[32] = 64;
    file[54] = 56;
    file[56] = u8::try_from(segments.len()).unwrap();
    for (index, (kind, content)) in segments.iter().enumerate() {
        let (header, offset) = (64 + 56 * index, file.len());
        file[header..header + 4].copy_from_slice(&kind.to_le_bytes());
        file[header + 8..header + 16].copy_from_slice(&(offset as u64).to_le_bytes());
        file[header + 32..header + 40].copy_from_slice(&(content.len() as u64).to_le_bytes());
        file.extend_from_slice(content);
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments() {
        let note = |name: &[u8], kind: u32| {
            let mut note = vec![u8::try_from(name.len()).unwrap(), 0, 0, 0, 2, 0, 0, 0];
            note.extend(kind.to_le_bytes());
            note.extend(name);
            note.resize(note.len().next_multiple_of(4), 0);
            note.extend([1, 1, 0, 0]);
            note
        };
        let notes = [note(b"Linux\0", 1), note(b"Xen\0", 18)].concat();
        let file = sample(&[(1, b"code"), (NOTE, &notes)]);
        let elf = Elf::parse(&file).unwrap();
        assert!(!elf.needs_interpreter());
        assert!(elf.has_note("Xen", 18));
        assert!(elf.has_note("Linux", 1));
        assert!(!elf.has_note("Xen", 17));
        assert!(!elf.has_note("Linux", 18));

        let file = sample(&[(INTERP, b"/lib64/ld-linux-x86-64.so.2\0")]);
        assert!(Elf::parse(&file).unwrap().needs_interpreter());
    }

    #[test]
    fn not_an_elf_file() {
        let whole = sample(&[(1, b"code")]);
        for cut in [0, 4, 40, 64, 100, whole.len() - 1] {
            assert!(Elf::parse(&whole[..cut]).is_none(), "cut at {cut}");
        }
        assert!(Elf::parse(b"#!/bin/sh\n").is_none());
    }

    #[test]
    fn endless_notes_end() {
        let huge = [0xff; 16];
        assert!(!Elf::parse(&sample(&[(NOTE, &huge)])).unwrap().has_note("Xen", 18));
    }
}
