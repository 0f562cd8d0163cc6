//! From the text of a YAML file to a [`Node`], by the events of the parser.
//!
//! One walk gives values and places, so the two cannot disagree. Knows no
//! pipeline. Invariant: depth and size of the tree are bounded whatever the text.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use indexmap::IndexMap;
use indexmap::map::Entry as Slot;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};

use super::node::{Data, Entry, Node};
use super::scalar::plain;
use super::source_map::{SourceMap, Span};

/// Deepest nesting of maps and lists.
pub(crate) const MAX_DEPTH: usize = 64;
/// Largest file, in bytes: some 500,000 steps of three lines. What is small in a file and
/// large in memory is bounded by itself, below.
pub(crate) const MAX_BYTES: usize = 64 << 20;
/// Values that aliases may add to a file by repeating what an anchor names.
pub(crate) const MAX_ALIASED: usize = 100_000;
/// Bytes of text that aliases may add.
pub(crate) const MAX_ALIASED_BYTES: usize = 8 << 20;

/// Reads the one document of file number `file`. Mistakes go to `map`; None when there is no
/// tree to go on with.
pub(crate) fn read(map: &mut SourceMap, file: u32, text: &Arc<str>) -> Option<Node> {
    let mut reader = Reader {
        map,
        file,
        text,
        offsets: Offsets::new(text),
        stack: Vec::new(),
        anchors: HashMap::new(),
        aliased: 0,
        aliased_bytes: 0,
        root: None,
    };
    let finished = reader.run();
    let root = reader.root.take();
    finished?;
    if root.is_none() {
        let at = Span {
            file,
            start: 0,
            end: 0,
        };
        let help = "a pipeline needs at least `steps:`".to_owned();
        map.report(at, "empty-file", "the file is empty", "", Some(help));
    }
    root
}

/// A map or list that is still open.
struct Frame {
    span: Span,
    anchor: usize,
    content: Content,
}

enum Content {
    List(Vec<Node>),
    Map {
        entries: IndexMap<String, Entry>,
        /// The key that waits for its value.
        key: Option<Key>,
        /// Values of `<<`.
        merges: Vec<Node>,
    },
}

struct Key {
    text: String,
    span: Span,
    merge: bool,
}

struct Reader<'a> {
    map: &'a mut SourceMap,
    file: u32,
    text: &'a str,
    offsets: Offsets,
    stack: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    aliased: usize,
    aliased_bytes: usize,
    root: Option<Node>,
}

/// Reading cannot go on; the mistake is noted.
type Step = Option<()>;

impl Reader<'_> {
    fn run(&mut self) -> Step {
        let mut parser = Parser::new_from_str(self.text);
        let mut documents = 0;
        while let Some(next) = parser.next_event() {
            let (event, span) = match next {
                Ok(next) => next,
                Err(error) => return self.syntax_error(&error),
            };
            let span = self.span(span.start, span.end);
            match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        let help = "put the second document into a file of its own".to_owned();
                        return self.stop(
                            span,
                            "yaml-documents",
                            "more than one document",
                            Some(help),
                        );
                    }
                }
                Event::Alias(id) => self.alias(id, span)?,
                Event::Scalar(text, style, anchor, tag) => {
                    self.scalar(text, style, anchor, tag.as_deref(), span)?;
                }
                Event::SequenceStart(anchor, tag) => {
                    self.open(Content::List(Vec::new()), anchor, tag.as_deref(), span)?;
                }
                Event::MappingStart(anchor, tag) => {
                    let content = Content::Map {
                        entries: IndexMap::new(),
                        key: None,
                        merges: Vec::new(),
                    };
                    self.open(content, anchor, tag.as_deref(), span)?;
                }
                Event::SequenceEnd | Event::MappingEnd => self.close(span)?,
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            }
        }
        Some(())
    }

    fn stop(
        &mut self,
        span: Span,
        code: &'static str,
        message: &str,
        help: Option<String>,
    ) -> Step {
        self.map.report(span, code, message, "", help);
        None
    }

    fn span(&self, start: Marker, end: Marker) -> Span {
        let start = self.offsets.byte(start.index(), self.text.len());
        let end = self.offsets.byte(end.index(), self.text.len()).max(start);
        Span {
            file: self.file,
            start: start as u32,
            end: end as u32,
        }
    }

    fn syntax_error(&mut self, error: &saphyr_parser::ScanError) -> Step {
        let marker = *error.marker();
        let mut span = self.span(marker, marker);
        if span.start as usize == self.text.len() {
            // The end of the text shows nothing: mark the last thing written.
            span.start = self.text.trim_end().len().saturating_sub(1) as u32;
            while !self.text.is_char_boundary(span.start as usize) {
                span.start -= 1;
            }
        }
        let rest = self.text.get(span.start as usize..).unwrap_or("");
        span.end = span.start + rest.chars().next().map_or(0, char::len_utf8) as u32;
        let line_start = self
            .text
            .get(..span.start as usize)
            .and_then(|t| t.rfind('\n'));
        let line = self
            .text
            .get(line_start.map_or(0, |i| i + 1)..)
            .unwrap_or("");
        let line = line.lines().next().unwrap_or("");
        let help = if line.contains("${{") {
            Some("inside `{ }` and `[ ]`, put an expression in quotes: `\"${{ … }}\"`".to_owned())
        } else if line.trim_start().starts_with('\t') {
            Some("YAML is indented with spaces, not tabs".to_owned())
        } else {
            None
        };
        self.stop(
            span,
            "yaml-syntax",
            &format!("not valid YAML: {}", error.info()),
            help,
        )
    }

    fn open(&mut self, content: Content, anchor: usize, tag: Option<&Tag>, span: Span) -> Step {
        if let Some(Frame {
            content: Content::Map { key: None, .. },
            ..
        }) = self.stack.last()
        {
            return self.stop(
                span,
                "yaml-key",
                "a key must be plain text, not a map or list",
                None,
            );
        }
        if self.stack.len() >= MAX_DEPTH {
            let message = format!("nested more than {MAX_DEPTH} deep");
            return self.stop(span, "yaml-limit", &message, None);
        }
        if tag.is_some_and(|t| !t.is_yaml_core_schema()) {
            self.unknown_tag(span);
        }
        self.stack.push(Frame {
            span,
            anchor,
            content,
        });
        Some(())
    }

    fn close(&mut self, end: Span) -> Step {
        let Some(frame) = self.stack.pop() else {
            return Some(());
        };
        let flow = self.map.text(Span {
            end: frame.span.start + 1,
            ..frame.span
        });
        let mut span = frame.span;
        let data = match frame.content {
            Content::List(items) => {
                if flow == "[" {
                    span.end = end.end.max(span.end);
                } else if let Some(first) = items.first() {
                    span = first.span;
                }
                Data::List(items)
            }
            Content::Map {
                mut entries,
                merges,
                ..
            } => {
                if flow == "{" {
                    span.end = end.end.max(span.end);
                } else if let Some((_, first)) = entries.first() {
                    span = first.key;
                }
                for merge in merges {
                    self.merge(&mut entries, merge);
                }
                Data::Map(entries)
            }
        };
        self.put(Node { span, data }, frame.anchor)
    }

    /// `<<`: entries that are not there yet come from the named map or maps.
    fn merge(&mut self, entries: &mut IndexMap<String, Entry>, from: Node) {
        match from.data {
            Data::Map(map) => {
                for (key, entry) in map {
                    entries.entry(key).or_insert(entry);
                }
            }
            Data::List(items) => {
                for item in items {
                    self.merge(entries, item);
                }
            }
            _ => self.map.report(
                from.span,
                "yaml-key",
                "`<<` takes a map or a list of maps",
                "",
                None,
            ),
        }
    }

    fn scalar(
        &mut self,
        text: Cow<'_, str>,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
        mut span: Span,
    ) -> Step {
        if matches!(style, ScalarStyle::Literal | ScalarStyle::Folded) {
            // The parser's span ends where the next token starts.
            let raw = self.map.text(span);
            span.end = span.start + raw.trim_end().len() as u32;
        }
        if self.takes_key() {
            let merge = style == ScalarStyle::Plain && text == "<<";
            if anchor > 0 {
                let node = Node {
                    span,
                    data: Data::Text(text.to_string()),
                };
                self.anchors.insert(anchor, node);
            }
            return self.key(text.into_owned(), span, merge);
        }
        let tag = tag.map(|t| (t.is_yaml_core_schema(), t.suffix.as_str()));
        let data = match (tag, style) {
            (None, ScalarStyle::Plain) => plain(&text),
            (Some((true, "str")), _) | (None, _) => Ok(Data::Text(text.into_owned())),
            (Some((true, "int" | "float" | "bool" | "null")), _) => plain(&text),
            _ => {
                self.unknown_tag(span);
                Ok(Data::Text(text.into_owned()))
            }
        };
        let data = data.unwrap_or_else(|problem| {
            let help = Some("put it in quotes to make it text".to_owned());
            self.map.report(span, "yaml-number", problem, "", help);
            Data::Null
        });
        self.put(Node { span, data }, anchor)
    }

    fn unknown_tag(&mut self, span: Span) {
        let help = "leave the tag out; `!!str` is allowed".to_owned();
        self.map.report(
            span,
            "yaml-tag",
            "YAML tags have no meaning here",
            "",
            Some(help),
        );
    }

    fn takes_key(&self) -> bool {
        matches!(
            self.stack.last(),
            Some(Frame {
                content: Content::Map { key: None, .. },
                ..
            })
        )
    }

    fn key(&mut self, text: String, span: Span, merge: bool) -> Step {
        if text.is_empty() {
            self.map.report(span, "yaml-key", "an empty key", "", None);
        }
        if let Some(Frame {
            content: Content::Map { key, .. },
            ..
        }) = self.stack.last_mut()
        {
            *key = Some(Key { text, span, merge });
        }
        Some(())
    }

    fn alias(&mut self, id: usize, span: Span) -> Step {
        let Some(node) = self.anchors.get(&id) else {
            return self.stop(
                span,
                "yaml-alias",
                "the alias stands inside its own anchor",
                None,
            );
        };
        let mut size = Size::default();
        size.add(node, 1);
        self.aliased += size.nodes;
        self.aliased_bytes += size.bytes;
        if self.aliased > MAX_ALIASED || self.aliased_bytes > MAX_ALIASED_BYTES {
            let message = format!("aliases make the file too large (over {MAX_ALIASED} values)");
            return self.stop(span, "yaml-limit", &message, None);
        }
        if self.stack.len() + size.depth > MAX_DEPTH {
            let message = format!("nested more than {MAX_DEPTH} deep");
            return self.stop(span, "yaml-limit", &message, None);
        }
        let node = node.clone();
        if self.takes_key() {
            return match node.data {
                Data::Text(text) => self.key(text, span, false),
                _ => self.stop(span, "yaml-key", "a key must be plain text", None),
            };
        }
        self.put(node, 0)
    }

    /// Puts a finished value where it belongs.
    fn put(&mut self, node: Node, anchor: usize) -> Step {
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return Some(());
        };
        match &mut frame.content {
            Content::List(items) => items.push(node),
            Content::Map {
                entries,
                key,
                merges,
            } => {
                // The parser gives keys and values in turn.
                let Some(key) = key.take() else {
                    return Some(());
                };
                if key.merge {
                    merges.push(node);
                    return Some(());
                }
                match entries.entry(key.text) {
                    Slot::Vacant(slot) => {
                        slot.insert(Entry {
                            key: key.span,
                            value: node,
                        });
                    }
                    Slot::Occupied(slot) => {
                        let name = slot.key().clone();
                        let first = slot.get().key;
                        self.duplicate(&name, key.span, first);
                    }
                }
            }
        }
        Some(())
    }

    fn duplicate(&mut self, name: &str, span: Span, first: Span) {
        let (path, line, column) = self.map.position(first);
        self.map.report(
            span,
            "duplicate-key",
            format!("the key `{name}` stands here a second time"),
            "second",
            Some(format!(
                "the first is at {}:{line}:{column}; keep one",
                path.display()
            )),
        );
    }
}

/// How much an alias would add.
#[derive(Default)]
struct Size {
    nodes: usize,
    bytes: usize,
    depth: usize,
}

impl Size {
    fn add(&mut self, node: &Node, depth: usize) {
        self.nodes += 1;
        match &node.data {
            Data::Text(text) => self.bytes += text.len(),
            Data::List(items) => {
                self.depth = self.depth.max(depth);
                items.iter().for_each(|item| self.add(item, depth + 1));
            }
            Data::Map(map) => {
                self.depth = self.depth.max(depth);
                for (key, entry) in map {
                    self.bytes += key.len();
                    self.add(&entry.value, depth + 1);
                }
            }
            Data::Null | Data::Bool(_) | Data::Number(_) => {}
        }
    }
}

/// The parser counts characters; places are bytes.
struct Offsets {
    /// Byte of each character; None when the text is ASCII.
    table: Option<Vec<u32>>,
}

impl Offsets {
    fn new(text: &str) -> Self {
        let table = || text.char_indices().map(|(i, _)| i as u32).collect();
        Self {
            table: (!text.is_ascii()).then(table),
        }
    }

    fn byte(&self, index: usize, len: usize) -> usize {
        match &self.table {
            None => index.min(len),
            Some(table) => table.get(index).map_or(len, |byte| *byte as usize),
        }
    }
}
