//! [`SourceMap`]: the texts that were read, and places in them.
//!
//! Knows no YAML. Invariant: a [`Span`] lies within its file and on character
//! boundaries; it is made only by the reader.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowrun_cache::Digest;

use super::diagnostic::{Diagnostic, Diagnostics};
use crate::finding::{Finding, Severity};

/// A place in one of the files, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Span {
    /// Which file, in the order of reading.
    pub(crate) file: u32,
    /// First byte.
    pub(crate) start: u32,
    /// Byte after the last.
    pub(crate) end: u32,
}

/// One file that was read.
#[derive(Debug)]
struct SourceFile {
    path: PathBuf,
    text: Arc<str>,
    /// Byte offset of the start of each line.
    lines: Vec<u32>,
    /// Of a step definition: the step that uses it, and where that says so.
    used: Option<(String, Span)>,
}

/// All files of a pipeline and the mistakes found in them.
#[derive(Debug, Default)]
pub(crate) struct SourceMap {
    files: Vec<SourceFile>,
    errors: Vec<(Span, Diagnostic)>,
    warnings: Vec<(Span, Diagnostic)>,
}

impl SourceMap {
    /// Adds a file; returns its number.
    pub(crate) fn add(&mut self, path: PathBuf, text: Arc<str>) -> u32 {
        let breaks = text.bytes().enumerate().filter(|(_, b)| *b == b'\n');
        let lines = std::iter::once(0)
            .chain(breaks.map(|(i, _)| i as u32 + 1))
            .collect();
        self.files.push(SourceFile {
            path,
            text,
            lines,
            used: None,
        });
        (self.files.len() - 1) as u32
    }

    /// Adds a step definition that the step `by` uses, as `at` says. Each use is a file of its
    /// own, so that a mistake in it can say which use it belongs to.
    pub(crate) fn add_used(&mut self, path: PathBuf, text: Arc<str>, by: &str, at: Span) -> u32 {
        let number = self.add(path, text);
        if let Some(file) = self.files.last_mut() {
            file.used = Some((by.to_owned(), at));
        }
        number
    }

    /// The path of the file that `span` lies in.
    pub(crate) fn path(&self, span: Span) -> PathBuf {
        let file = self.files.get(span.file as usize);
        file.map(|f| f.path.clone()).unwrap_or_default()
    }

    /// Where the step definition that `span` lies in is used, outwards.
    fn uses(&self, span: Span) -> Vec<String> {
        let mut notes = Vec::new();
        let mut file = self.files.get(span.file as usize);
        while let Some((by, at)) = file.and_then(|f| f.used.as_ref()) {
            let (path, line, column) = self.position(*at);
            notes.push(format!(
                "used by the step `{by}` at {}:{line}:{column}",
                path.display()
            ));
            file = self.files.get(at.file as usize);
        }
        notes
    }

    /// The files that were read, with the digests of their texts.
    pub(crate) fn sources(&self) -> Vec<(PathBuf, Digest)> {
        let files = self.files.iter();
        files
            .map(|f| (f.path.clone(), Digest::of_bytes(f.text.as_bytes())))
            .collect()
    }

    /// The files that were read.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|f| f.path.as_path())
    }

    /// The text of `span` as written.
    pub(crate) fn text(&self, span: Span) -> &str {
        self.files
            .get(span.file as usize)
            .and_then(|f| f.text.get(span.start as usize..span.end as usize))
            .unwrap_or("")
    }

    /// Path, line and column (from 1, in characters) of the start of `span`.
    pub(crate) fn position(&self, span: Span) -> (PathBuf, usize, usize) {
        let Some(file) = self.files.get(span.file as usize) else {
            return (PathBuf::new(), 1, 1);
        };
        let line = file
            .lines
            .partition_point(|start| *start <= span.start)
            .max(1);
        let start = file.lines.get(line - 1).copied().unwrap_or(0);
        let before = file
            .text
            .get(start as usize..span.start as usize)
            .unwrap_or("");
        (file.path.clone(), line, before.chars().count() + 1)
    }

    /// Notes a mistake at `span`. Only the first line of the span is marked.
    pub(crate) fn report(
        &mut self,
        span: Span,
        code: &'static str,
        message: impl Into<String>,
        label: impl Into<String>,
        help: Option<String>,
    ) {
        let error = self.diagnostic(span, code, message.into(), label.into(), help);
        self.errors.push((span, error));
    }

    /// Notes what the vocabulary found at `span`.
    pub(crate) fn report_finding(&mut self, span: Span, finding: Finding) {
        let Finding {
            severity,
            code,
            message,
            help,
            ..
        } = finding;
        let found = Diagnostic {
            severity,
            ..self.diagnostic(span, code, message, String::new(), Some(help))
        };
        match severity {
            Severity::Error => self.errors.push((span, found)),
            Severity::Warning => self.warnings.push((span, found)),
        }
    }

    fn diagnostic(
        &self,
        span: Span,
        code: &'static str,
        message: String,
        label: String,
        help: Option<String>,
    ) -> Diagnostic {
        let (path, line, column) = self.position(span);
        let text = self.text(span);
        let len = text.find(['\n', '\r']).unwrap_or(text.len());
        let source = self
            .files
            .get(span.file as usize)
            .map_or(Arc::from(""), |f| f.text.clone());
        Diagnostic {
            severity: Severity::Error,
            file: path,
            line,
            column,
            len,
            offset: span.start as usize,
            code,
            message,
            label,
            help,
            notes: self.uses(span),
            source,
        }
    }

    /// Notes a mistake that concerns a whole file.
    pub(crate) fn report_file(&mut self, error: Diagnostic) {
        let span = Span {
            file: self.files.len() as u32,
            ..Span::default()
        };
        self.errors.push((span, error));
    }

    /// True once a mistake was noted.
    pub(crate) fn has_errors(&self) -> bool {
        !self.errors.is_empty()
    }

    /// True when a mistake within `span` was noted.
    pub(crate) fn has_error_in(&self, span: Span) -> bool {
        let within = |at: &Span| at.start >= span.start && at.end <= span.end;
        self.errors
            .iter()
            .any(|(at, _)| at.file == span.file && within(at))
    }

    /// The mistakes in file order, each once: one of a step definition that is used several
    /// times names its uses.
    pub(crate) fn into_diagnostics(mut self) -> Diagnostics {
        let errors = std::mem::take(&mut self.errors);
        self.in_order(errors)
    }

    /// What may be a mistake, in the same way.
    pub(crate) fn into_warnings(mut self) -> Diagnostics {
        let warnings = std::mem::take(&mut self.warnings);
        self.in_order(warnings)
    }

    fn in_order(&self, found: Vec<(Span, Diagnostic)>) -> Diagnostics {
        let mut order: HashMap<PathBuf, u32> = HashMap::new();
        for (number, file) in self.files.iter().enumerate() {
            order.entry(file.path.clone()).or_insert(number as u32);
        }
        let place = |span: &Span, error: &Diagnostic| {
            let file = order.get(&error.file).copied().unwrap_or(span.file);
            (file, span.start, error.code, error.message.clone())
        };
        let mut found: Vec<_> = found
            .into_iter()
            .map(|(span, error)| (place(&span, &error), error))
            .collect();
        // Stable: mistakes at one place stay in the order in which they were found.
        found.sort_by_key(|((file, start, ..), _)| (*file, *start));
        let mut errors: Vec<Diagnostic> = Vec::new();
        let mut at: HashMap<_, usize> = HashMap::new();
        for (place, error) in found {
            match at.get(&place) {
                Some(i) => {
                    let notes = &mut errors[*i].notes;
                    let more = error.notes.into_iter().filter(|n| !notes.contains(n));
                    let more: Vec<String> = more.collect();
                    notes.extend(more);
                }
                None => {
                    at.insert(place, errors.len());
                    errors.push(error);
                }
            }
        }
        errors.iter_mut().for_each(|e| shorten(&mut e.notes));
        Diagnostics { errors }
    }

    /// The place of `snippet` (a piece of an expression) within the scalar at `span`, where
    /// `skip` expressions come before it; the scalar itself when it is written otherwise there.
    pub(crate) fn narrow(&self, span: Span, skip: usize, snippet: &str) -> Span {
        let raw = self.text(span);
        let from = match skip {
            0 => raw.find("${{").unwrap_or(0),
            n => match raw.match_indices("${{").nth(n) {
                Some((at, _)) => at,
                None => return span,
            },
        };
        match raw.get(from..).and_then(|tail| find_word(tail, snippet)) {
            Some(at) if !snippet.is_empty() => {
                let start = span.start + (from + at) as u32;
                Span {
                    start,
                    end: start + snippet.len() as u32,
                    ..span
                }
            }
            _ => span,
        }
    }
}

/// A definition may be used thousands of times.
fn shorten(notes: &mut Vec<String>) {
    const SHOWN: usize = 4;
    if notes.len() > SHOWN {
        let more = notes.len() - SHOWN;
        notes.truncate(SHOWN);
        notes.push(format!("and {more} more"));
    }
}

/// Where `word` stands in `text`, not as a part of a longer word.
fn find_word(text: &str, word: &str) -> Option<usize> {
    let part = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    text.match_indices(word).map(|(at, _)| at).find(|at| {
        let before = text.get(..*at).and_then(|t| t.chars().next_back());
        let after = text.get(at + word.len()..).and_then(|t| t.chars().next());
        let continues_before = word.starts_with(part) && before.is_some_and(part);
        let continues_after = word.ends_with(part) && after.is_some_and(part);
        !continues_before && !continues_after
    })
}
