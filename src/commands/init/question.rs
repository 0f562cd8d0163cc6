//! [`Asker`]: asks on a terminal, or not at all.

use std::io::BufRead;

/// Asks on stderr, hears on the reader it is given.
pub(super) struct Asker<'a> {
    answers: Option<&'a mut dyn BufRead>,
}

impl<'a> Asker<'a> {
    /// Without a reader nothing is asked.
    pub(super) fn new(answers: Option<&'a mut (dyn BufRead + 'a)>) -> Self {
        Self { answers }
    }

    /// The answer; the default when it is empty, nothing when there is neither.
    #[allow(clippy::print_stderr)]
    pub(super) fn ask(&mut self, question: &str, default: Option<&str>) -> Option<String> {
        let answers = self.answers.as_mut()?;
        let shown = default.map(|d| format!(" [{d}]")).unwrap_or_default();
        eprint!("{question}{shown}: ");
        let mut line = String::new();
        answers.read_line(&mut line).ok()?;
        match line.trim() {
            "" => default.map(str::to_owned),
            answer => Some(answer.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_answer_is_the_default() {
        let mut answers = "\nmine\n\n".as_bytes();
        let mut asker = Asker::new(Some(&mut answers));
        assert_eq!(asker.ask("q", Some("d")).as_deref(), Some("d"));
        assert_eq!(asker.ask("q", Some("d")).as_deref(), Some("mine"));
        assert_eq!(asker.ask("q", None), None);
        assert_eq!(Asker::new(None).ask("q", Some("d")), None);
    }
}
