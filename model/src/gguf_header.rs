//! The header of a GGUF file: its metadata and what tensors it has. Every reader of such a file
//! begins here.
//!
//! Invariant: a header that candle would panic on is an error.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use crate::error::ModelError;

/// Reads the header of the file at `path`; the reader goes on with the tensors.
///
/// # Errors
/// [`ModelError::Io`] when it cannot be opened, [`ModelError::Format`] when it is no GGUF file.
pub(crate) fn open(path: &Path) -> Result<(Content, BufReader<File>), ModelError> {
    let file = File::open(path).map_err(ModelError::io(path))?;
    let mut reader = BufReader::new(file);
    let content = read(&mut reader).map_err(|e| ModelError::format(path, e))?;
    Ok((content, reader))
}

fn read<R: Read + Seek>(reader: &mut R) -> candle_core::Result<Content> {
    Content::read(&mut Header::new(reader))
}

/// The reader of a header that refuses an alignment of 0, by which candle would divide.
///
/// It goes by candle's way of reading an entry: the key, the type and the value, each at once.
struct Header<R> {
    inner: R,
    next: Expected,
}

enum Expected {
    Anything,
    TypeOfAlignment,
    Alignment,
}

impl<R> Header<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            next: Expected::Anything,
        }
    }
}

impl<R: Read> Read for Header<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(buffer)?;
        self.next = match self.next {
            Expected::Anything if without_end(buffer) == b"general.alignment" => {
                Expected::TypeOfAlignment
            }
            Expected::Anything => Expected::Anything,
            Expected::TypeOfAlignment => Expected::Alignment,
            Expected::Alignment if buffer.iter().all(|byte| *byte == 0) => {
                let reason = "the entry `general.alignment` is 0";
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            Expected::Alignment => Expected::Anything,
        };
        Ok(())
    }
}

/// A text as candle takes it: zeros at its end are no part of it.
fn without_end(text: &[u8]) -> &[u8] {
    let end = text.iter().rposition(|byte| *byte != 0);
    &text[..end.map_or(0, |last| last + 1)]
}

impl<R: Seek> Seek for Header<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A header with this one entry, and no tensors.
    pub(crate) fn with_alignment(alignment: u32) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(17u64.to_le_bytes());
        bytes.extend(b"general.alignment");
        bytes.extend(4u32.to_le_bytes());
        bytes.extend(alignment.to_le_bytes());
        bytes
    }

    #[test]
    fn an_alignment_of_0_is_an_error_and_any_other_is_read() {
        let header = |alignment| read(&mut io::Cursor::new(with_alignment(alignment)));
        assert_eq!(header(64).unwrap().tensor_data_offset, 64);
        let error = header(0).err().unwrap().to_string();
        assert!(error.contains("`general.alignment` is 0"), "{error}");
    }
}
