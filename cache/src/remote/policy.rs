//! [`Policy`]: what is done about a remote that refuses: it is left alone for the rest of
//! the run, with one warning.

use std::sync::{Mutex, OnceLock, PoisonError};

use object_store::Error;

/// Why something was not read or written.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It is not there.
    Missing,
    /// It is there already.
    Exists,
    /// The store cannot do this.
    Unable,
    /// These credentials may not, or are wrong.
    Denied(String),
    /// It was not asked: it refused before.
    Left,
    /// There is no answer, or one of a server in trouble.
    Unreachable(String),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let text = reason(&error);
        match error {
            // The bucket itself: nothing can be found in it, and nothing written.
            Error::NotFound { .. }
                if text.contains("NoSuchBucket") || text.contains("ContainerNotFound") =>
            {
                Self::Unreachable(text)
            }
            Error::NotFound { .. } => Self::Missing,
            // Of an upload that the server forgot, in part or whole.
            _ if text.contains("NoSuchUpload") || text.contains("InvalidPart") => Self::Missing,
            Error::AlreadyExists { .. } | Error::Precondition { .. } => Self::Exists,
            Error::NotImplemented { .. } | Error::NotSupported { .. } => Self::Unable,
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Self::Denied(text),
            _ => Self::Unreachable(text),
        }
    }
}

/// What went wrong, in a few words without addresses (which may hold a token): the innermost
/// cause, or the code in an answer of S3's.
pub(super) fn reason(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let text = cause.to_string();
    let tag = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once('<')?.0.trim().to_owned())
    };
    match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => text.lines().next().unwrap_or_default().to_owned(),
    }
}

/// Whether the remote is still asked.
#[derive(Debug, Default)]
pub(super) struct Policy {
    reading: OnceLock<String>,
    writing: OnceLock<String>,
    warnings: Mutex<Vec<String>>,
}

impl Policy {
    pub(super) fn reads(&self) -> bool {
        self.reading.get().is_none()
    }

    pub(super) fn writes(&self) -> bool {
        self.reads() && self.writing.get().is_none()
    }

    /// A read was refused otherwise than by saying that something is missing.
    pub(super) fn no_more_reads(&self, url: &str, why: &str) {
        if self.reading.set(why.to_owned()).is_ok() {
            self.warn(format!(
                "the remote cache {url} cannot be used ({why}); the run goes on without it"
            ));
        }
    }

    /// A write was refused.
    pub(super) fn no_more_writes(&self, url: &str, why: &str) {
        if self.reads() && self.writing.set(why.to_owned()).is_ok() {
            self.warn(format!(
                "the remote cache {url} cannot be written to ({why}); results stay here, and a later run sends them. `--remote-read-only` sends none"
            ));
        }
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.reading.get().or(self.writing.get()).cloned()
    }

    pub(super) fn warn(&self, text: String) {
        self.lock().push(text);
    }

    pub(super) fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_refusal_is_told_and_no_other() {
        let policy = Policy::default();
        policy.no_more_writes("u", "denied");
        policy.no_more_writes("u", "denied");
        assert!(policy.reads() && !policy.writes());
        policy.no_more_reads("u", "gone");
        policy.no_more_reads("u", "gone");
        policy.no_more_writes("u", "gone");
        assert!(!policy.reads());
        assert_eq!(policy.take_warnings().len(), 2);
        assert!(policy.take_warnings().is_empty());
    }

    #[test]
    fn an_answer_of_s3_is_said_in_its_words() {
        let body = "<?xml?><Error><Code>SignatureDoesNotMatch</Code><Message>Wrong.</Message><Key>k</Key></Error>";
        let error = Error::PermissionDenied {
            path: "p".into(),
            source: body.into(),
        };
        assert_eq!(reason(&error), "SignatureDoesNotMatch: Wrong.");
        assert!(matches!(Refusal::from(error), Refusal::Denied(_)));
        let missing = |source: &str| Error::NotFound {
            path: "p".into(),
            source: source.into(),
        };
        assert!(matches!(Refusal::from(missing("x")), Refusal::Missing));
        for code in ["NoSuchBucket", "ContainerNotFound"] {
            let bucket = missing(&format!("<Code>{code}</Code>"));
            assert!(matches!(Refusal::from(bucket), Refusal::Unreachable(_)));
        }
    }
}
