//! What commands print on stdout. A reader that went away (`flowrun runs | head -1`) is no error.

use std::io::{ErrorKind, Write};

use serde::Serialize;

use crate::exit::{Exit, Failure};

/// Prints text.
pub(crate) fn print(text: &str) -> Result<Exit, Failure> {
    print_bytes(text.as_bytes())
}

/// Prints what may be no text.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<Exit, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(unwritable(&e)),
        _ => Ok(Exit::Ok),
    }
}

/// Standard output cannot be written, for another reason than that nobody reads it.
pub(crate) fn unwritable(error: &std::io::Error) -> Failure {
    let text = format!("standard output cannot be written: {error}");
    Failure::new(Exit::Internal, text)
}

/// Prints a value as one line of JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<Exit, Failure> {
    let mut text = serde_json::to_string(value).map_err(std::io::Error::from)?;
    text.push('\n');
    print(&text)
}

/// A number of bytes for people: `512 B`, `1.2 GB` (powers of 1000).
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `1 step`, `3 steps`.
pub(crate) fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_short() {
        let shown = [0, 999, 1000, 1_250_000, 999_960_000, 20_000_000_000].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "999 B", "1.0 kB", "1.2 MB", "1.0 GB", "20.0 GB"]
        );
    }
}
