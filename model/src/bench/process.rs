//! What the system tells of this process: processor time, and the most memory that it held.

/// Processor seconds so far, of all threads.
pub(super) fn cpu_seconds() -> Option<f64> {
    // Ticks are a hundredth of a second on every Linux that this runs on.
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / 100.0)
}

/// Bytes of main memory at most, since the start or [`forget_peak`].
pub(super) fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Has the system take what is held now for the most that was held; whether it does that.
pub(super) fn forget_peak() -> bool {
    // proc_pid_clear_refs(5): the value 5 resets the peak of the resident set. Not every kernel
    // and container allows it.
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(test)]
#[cfg(target_os = "linux")]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_system_tells_time_and_memory() {
        let before = cpu_seconds().unwrap();
        assert!(cpu_seconds().unwrap() >= before);
        assert!(peak_bytes().unwrap() > 1 << 20);
    }

    /// In a process of its own, since what other tests hold would be told too.
    #[test]
    fn a_peak_that_was_forgotten_is_told_no_more() {
        const ALONE: &str = "FLOWRUN_TEST_ALONE";
        const HELD: usize = 64 << 20;
        if std::env::var_os(ALONE).is_none() {
            let (_, module) = module_path!().split_once("::").unwrap();
            let name = format!("{module}::a_peak_that_was_forgotten_is_told_no_more");
            let mut again = std::process::Command::new(std::env::current_exe().unwrap());
            let output = again
                .args(["--exact", name.as_str()])
                .env(ALONE, "1")
                .output();
            let said = String::from_utf8(output.unwrap().stdout).unwrap();
            assert!(said.contains("1 passed"), "{said}");
            return;
        }
        drop(std::hint::black_box(vec![1u8; HELD]));
        let before = peak_bytes().unwrap();
        assert!(before >= HELD as u64);
        if forget_peak() {
            assert!(peak_bytes().unwrap() < before);
        }
    }
}
