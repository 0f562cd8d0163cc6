//! Reading a pipeline file and the files that it includes, into one tree.
//!
//! Knows files and limits, and no steps. Invariant: nothing of unbounded size or
//! unknown encoding gets past this module.

use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::of_file;
use super::node::{Data, Node};
use super::overlay::{Variants, merge};
use super::reader::{MAX_BYTES, read};
use super::source_map::{SourceMap, Span};

/// Most files of one pipeline.
const MAX_FILES: usize = 64;

/// Reads `file` and what it includes, merged. Mistakes go to `map`; None when there is no tree.
pub(crate) fn load(map: &mut SourceMap, file: &Path, variants: &Variants<'_>) -> Option<Node> {
    let text = match text_of(file) {
        Ok(text) => text,
        Err(problem) => {
            problem.report(map, file);
            return None;
        }
    };
    let mut loader = Loader {
        map,
        variants,
        open: Vec::new(),
        files: 0,
    };
    loader.file(file, text)
}

/// Reads a step definition that the step `by` uses, as `at` says. Mistakes go to `map`.
pub(crate) fn load_used(map: &mut SourceMap, file: &Path, by: &str, at: Span) -> Option<Node> {
    let text = match text_of_named(file) {
        Ok(text) => text,
        Err(Unreadable::File(reason)) => {
            let help = "the path is relative to the file that names it".to_owned();
            let message = format!("cannot read `{}`: {reason}", map.text(at));
            map.report(at, "definition", message, "", Some(help));
            return None;
        }
        Err(problem) => {
            problem.report(map, file);
            return None;
        }
    };
    let number = map.add_used(file.to_path_buf(), text.clone(), by, at);
    read(map, number, &text)
}

struct Loader<'a> {
    map: &'a mut SourceMap,
    variants: &'a Variants<'a>,
    /// The files that are being read, outermost first.
    open: Vec<PathBuf>,
    files: usize,
}

impl Loader<'_> {
    fn file(&mut self, path: &Path, text: Arc<str>) -> Option<Node> {
        self.files += 1;
        let number = self.map.add(path.to_path_buf(), text.clone());
        let root = read(self.map, number, &text)?;
        if root.as_map().is_none() {
            let message = format!("a pipeline file is a map, not {}", root.describe());
            self.map.report(root.span, "wrong-type", message, "", None);
            return None;
        }
        self.open.push(identity(path));
        let merged = self.includes(path, root);
        self.open.pop();
        Some(merged)
    }

    /// The tree of a file over the trees of the files it includes.
    fn includes(&mut self, path: &Path, root: Node) -> Node {
        let folder = path.parent().unwrap_or(Path::new(""));
        let wanted: Vec<(String, Span)> = root
            .get("include")
            .and_then(Node::as_list)
            .unwrap_or_default()
            .iter()
            .filter_map(|item| Some((item.as_text()?.to_owned(), item.span)))
            .collect();
        let mut under: Option<Node> = None;
        for (name, span) in wanted {
            let Some(mut tree) = self.include(&folder.join(&name), &name, span) else {
                continue;
            };
            tree.remove(&["include".to_owned()]);
            match &mut under {
                Some(under) => merge(under, tree, self.variants),
                None => under = Some(tree),
            }
        }
        match under {
            Some(mut under) => {
                merge(&mut under, root, self.variants);
                under
            }
            None => root,
        }
    }

    fn include(&mut self, path: &Path, name: &str, span: Span) -> Option<Node> {
        let path = tidy(path);
        if self.open.contains(&identity(&path)) {
            let message = format!("`{name}` includes itself");
            self.map.report(span, "include", message, "", None);
            return None;
        }
        if self.files >= MAX_FILES {
            let message = format!("more than {MAX_FILES} files in one pipeline");
            self.map.report(span, "yaml-limit", message, "", None);
            return None;
        }
        match text_of_named(&path) {
            Ok(text) => self.file(&path, text),
            Err(Unreadable::File(reason)) => {
                let help = "included paths are relative to the file that names them".to_owned();
                let message = format!("cannot read `{name}`: {reason}");
                self.map.report(span, "include", message, "", Some(help));
                None
            }
            Err(problem) => {
                problem.report(self.map, &path);
                None
            }
        }
    }
}

/// Why a file has no text.
enum Unreadable {
    /// The system says so.
    File(String),
    /// It is larger than allowed.
    TooLarge,
    /// Something in it is not text.
    NotText {
        message: &'static str,
        before: String,
    },
}

impl Unreadable {
    fn report(self, map: &mut SourceMap, path: &Path) {
        let (code, message, help) = match self {
            Self::File(reason) => (
                "unreadable",
                format!("cannot read the file: {reason}"),
                None,
            ),
            Self::TooLarge => {
                let message = format!("the file is larger than {} MiB", MAX_BYTES >> 20);
                ("yaml-limit", message, None)
            }
            Self::NotText { message, before } => {
                // The place can be shown: everything before it is text.
                let at = before.len() as u32;
                let file = map.add(path.to_path_buf(), Arc::from(before));
                let help = Some("save the file as UTF-8 text".to_owned());
                let span = Span {
                    file,
                    start: at,
                    end: at,
                };
                return map.report(span, "not-text", message, "", help);
            }
        };
        map.report_file(of_file(path, code, message, help));
    }
}

/// The text of a file that a file names. A pipe there may never have a writer: to open it would wait.
fn text_of_named(path: &Path) -> Result<Arc<str>, Unreadable> {
    let meta = std::fs::metadata(path).map_err(|e| Unreadable::File(e.to_string()))?;
    match meta.is_file() || meta.is_dir() {
        true => text_of(path),
        false => Err(Unreadable::File("it is neither a file nor a folder".into())),
    }
}

/// The text of a file, without a byte order mark.
fn text_of(path: &Path) -> Result<Arc<str>, Unreadable> {
    let system = |e: std::io::Error| Unreadable::File(e.to_string());
    let file = std::fs::File::open(path).map_err(system)?;
    if file.metadata().map_err(system)?.is_dir() {
        return Err(Unreadable::File("it is a folder".into()));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(system)?;
    decode(&bytes)
}

fn decode(bytes: &[u8]) -> Result<Arc<str>, Unreadable> {
    if bytes.len() > MAX_BYTES {
        return Err(Unreadable::TooLarge);
    }
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let before = bytes.get(..e.valid_up_to()).unwrap_or_default();
        let before = String::from_utf8_lossy(before).into_owned();
        Unreadable::NotText {
            message: "the file is not UTF-8",
            before,
        }
    })?;
    if let Some(at) = text.find('\0') {
        let before = text[..at].to_owned();
        return Err(Unreadable::NotText {
            message: "the file holds a NUL byte",
            before,
        });
    }
    Ok(Arc::from(text.strip_prefix('\u{feff}').unwrap_or(text)))
}

/// The path that tells one file from another.
pub(crate) fn identity(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

/// The path without `.` parts, as people write it.
pub(crate) fn tidy(path: &Path) -> PathBuf {
    path.components()
        .filter(|c| !matches!(c, Component::CurDir))
        .collect()
}

/// The one tree of a text, for values given on the command line.
pub(crate) fn value_of(text: &str) -> Option<Data> {
    let mut map = SourceMap::default();
    let text: Arc<str> = Arc::from(text);
    let file = map.add(PathBuf::new(), text.clone());
    let node = read(&mut map, file, &text)?;
    (!map.has_errors()).then_some(node.data)
}
