//! What this machine cannot be asked.

use std::io::Write;

/// Says on stderr that a test, or a part of it, is skipped, in a line that begins with `skipped: `.
/// Past the test harness, which keeps to itself what a test that passes prints: such lines can be
/// read, and counted, after every run.
pub(crate) fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // As one write, so that lines of several tests do not mix.
    let line = format!("skipped: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
