//! Chat templates: the Jinja program in a model's files that turns messages into its prompt.
//!
//! Knows nothing of tokens. Rendering is a pure function: a template that asks for today's date
//! gets the date that Meta's templates use when they have no clock, so a cached prompt never
//! depends on the day it was rendered.
//!
//! A template comes with a model's files, so a stranger wrote it. Invariant: what a rendering may
//! do is bounded ([`FUEL`]), its instructions and the texts that it makes; one that goes on for
//! longer is an error.

use std::collections::BTreeMap;
use std::io::Write;

use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::{Deserialize, Serialize};

use crate::error::ModelError;

const NAME: &str = "chat";
/// The template of models that bring none.
pub(crate) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' \
    + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// What one rendering may do, as minijinja counts it: one for each instruction, and one for each 64
/// bytes of the texts that it reads and makes, those on the way too. So a template makes some 320
/// MB at most. Chats of a million tokens, which are some four million bytes, take a tenth of it in
/// templates that copy each message a handful of times.
const FUEL: u64 = 5_000_000;

/// What else a template is told, by name (`chat_template_kwargs` of `apply_chat_template` and of
/// vLLM): `enable_thinking` of Qwen 3, for one.
pub type TemplateArguments = BTreeMap<String, serde_json::Value>;

/// Names that are not the caller's to give.
const OWN: [&str; 2] = ["messages", "add_generation_prompt"];

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A compiled chat template with the special tokens that it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the texts of the begin and end tokens, empty where
    /// the model has none. Whitespace is handled as by Hugging Face's `apply_chat_template`.
    ///
    /// # Errors
    /// [`ModelError::Template`] with the line where the template does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ModelError> {
        let parsed = |e: Error| ModelError::Template(format!("{e:#}"));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(parsed)?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(parsed)?;
        Ok(Self {
            environment,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
        })
    }

    /// ChatML: the template of a model that brings none.
    pub fn chatml() -> Result<Self, ModelError> {
        Self::new(CHATML, "<|im_start|>", "<|im_end|>")
    }

    /// Renders a conversation; `add_generation_prompt` ends it with the assistant's header, so
    /// that the model answers.
    ///
    /// # Errors
    /// [`ModelError::Template`] when the template refuses the messages (some allow no system
    /// message, or want user and assistant to alternate), or does not come to an end.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        self.render_with(messages, add_generation_prompt, &TemplateArguments::new())
    }

    /// The same, with what else the template is to know. A name that the template does not ask for
    /// has no effect, as in `apply_chat_template`.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and for the names of what every template is told.
    pub fn render_with(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        arguments: &TemplateArguments,
    ) -> Result<String, ModelError> {
        if let Some(name) = OWN.into_iter().find(|name| arguments.contains_key(*name)) {
            return Err(ModelError::Template(format!(
                "`chat_template_kwargs` may not hold `{name}`; every template is told it"
            )));
        }
        let special = [("bos_token", &self.bos), ("eos_token", &self.eos)];
        let special = special.map(|(name, token)| (name.to_owned(), Value::from(token.as_str())));
        let mut told = BTreeMap::from(special);
        let arguments = arguments.iter();
        told.extend(arguments.map(|(name, value)| (name.clone(), Value::from(Serde(value)))));
        let messages: Vec<Value> = messages.iter().map(message).collect();
        told.insert("messages".to_owned(), messages.into());
        told.insert(
            "add_generation_prompt".to_owned(),
            add_generation_prompt.into(),
        );
        let template = self.environment.get_template(NAME);
        let template = template.and_then(|template| template.render(told));
        template.map_err(|e| failed(&e))
    }

    /// What is written after an assistant's message; empty where the template refuses a question
    /// with its answer.
    pub(crate) fn after_answer(&self) -> String {
        // Nothing that a template looks for.
        const SAID: &str = "\u{E000}said\u{E001}";
        let chat = [
            ChatMessage::new("user", "a"),
            ChatMessage::new("assistant", SAID),
        ];
        let rendered = self.render(&chat, false).unwrap_or_default();
        let after = rendered.rsplit_once(SAID);
        after.map_or(String::new(), |(_, after)| after.to_owned())
    }
}

/// Whether a rendering did more than it may; what it was about then wraps that.
fn is_spent(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(this) = cause {
        let own = this.downcast_ref::<Error>();
        if own.is_some_and(|own| own.kind() == ErrorKind::OutOfFuel) {
            return true;
        }
        cause = this.source();
    }
    false
}

/// Why a rendering failed.
fn failed(error: &Error) -> ModelError {
    if !is_spent(error) {
        return ModelError::Template(error.to_string());
    }
    let line = error.line().map(|line| format!(" in line {line}"));
    ModelError::Template(format!(
        "the model's chat template was stopped{}: it did more than {FUEL} instructions and 64-byte \
         pieces of text, and a sound one needs far fewer; look for a loop or a text that grows \
         without end in it, or take the template of the model's own publisher",
        line.unwrap_or_default()
    ))
}

fn message(message: &ChatMessage) -> Value {
    Value::from_pairs([
        ("role", message.role.as_str()),
        ("content", message.content.as_str()),
    ])
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// `strftime` of 26 July 2024 at midnight, for the directives that templates use.
fn strftime(format: String) -> String {
    let pairs = [
        ("%Y", "2024"),
        ("%m", "07"),
        ("%d", "26"),
        ("%B", "July"),
        ("%b", "Jul"),
        ("%A", "Friday"),
        ("%a", "Fri"),
        ("%y", "24"),
        ("%H", "00"),
        ("%M", "00"),
        ("%S", "00"),
    ];
    pairs.iter().fold(format, |text, (directive, value)| {
        text.replace(directive, value)
    })
}

/// Python's `json.dumps(value, ensure_ascii=False)`, which Hugging Face puts in place of Jinja's
/// own HTML-safe filter.
fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut text = Charged {
        charge: |fuel| state.consume_fuel(fuel),
        bytes: Vec::new(),
        spent: None,
    };
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut text, Python,
        )),
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut text, pretty,
            ))
        }
    };
    if let Some(spent) = text.spent {
        return Err(spent);
    }
    written.map_err(failed)?;
    String::from_utf8(text.bytes)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// A text that is paid for as it grows: a small value that holds itself twice, over and over, is a
/// text without end.
struct Charged<F> {
    charge: F,
    bytes: Vec<u8>,
    /// Why it did not go on.
    spent: Option<Error>,
}

impl<F: Fn(u64) -> Result<(), Error>> Write for Charged<F> {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        // One for the piece, as for an instruction.
        let fuel = 1 + piece.len() as u64 / 64;
        if let Err(spent) = (self.charge)(fuel) {
            self.spent = Some(spent);
            return Err(std::io::Error::other("out of fuel"));
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Python's separators: `, ` and `: `.
struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, ModelError> {
        ChatTemplate::new(source, "<s>", "</s>")
            .unwrap()
            .render(messages, true)
    }

    #[test]
    fn a_missing_system_message_gets_the_models_own() {
        let text = render(SMOLLM2, &[ChatMessage::new("user", "hi")]).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
             Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
        let messages = [
            ChatMessage::new("system", "s"),
            ChatMessage::new("user", "<b> & 'c'"),
        ];
        assert_eq!(
            render(SMOLLM2, &messages).unwrap(),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<b> & 'c'<|im_end|>\n\
             <|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_and_hugging_face_functions_work() {
        let source = "{{ bos_token }}\n{% if messages[0].content.startswith('a') %}\n\
            {{ messages[0]['content'].strip() | upper }}\n    {% endif %}\n\
            {{ strftime_now('%d %b %Y') }} {{ messages | tojson }}{% break_me %}";
        let source = source.replace("{% break_me %}", "");
        let text = render(&source, &[ChatMessage::new("user", "a<é ")]).unwrap();
        assert_eq!(
            text,
            "<s>\nA<É\n26 Jul 2024 [{\"role\": \"user\", \"content\": \"a<é \"}]"
        );
    }

    /// What Qwen 3's template is made of: a namespace, messages from the last to the first, methods
    /// and tests on texts, names that are not there.
    const THINKING: &str = r"{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' and message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- 'tools' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and not message.tool_calls %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if loop.index0 > ns.last and loop.last %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}";

    #[test]
    fn a_template_that_hides_earlier_thoughts_works() {
        let said = ChatMessage::new("assistant", "<think>\nhm\n</think>\n\nb");
        let user = |text: &str| ChatMessage::new("user", text);
        let told = |messages: &[ChatMessage], ask| {
            let template = ChatTemplate::new(THINKING, "", "<|im_end|>").unwrap();
            template.render(messages, ask).unwrap()
        };
        assert_eq!(
            told(&[user("a"), said.clone(), user("c")], true),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n\
             <|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(
            told(&[user("a"), said], false),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\
             b<|im_end|>\n"
        );
    }

    #[test]
    fn a_template_is_told_what_its_caller_says_besides() {
        let template = ChatTemplate::new(THINKING, "", "<|im_end|>").unwrap();
        let told = |name: &str, value: serde_json::Value| {
            let arguments = TemplateArguments::from([(name.to_owned(), value)]);
            template.render_with(&[ChatMessage::new("user", "a")], true, &arguments)
        };
        let plain = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n";
        let quick = format!("{plain}<think>\n\n</think>\n\n");
        assert_eq!(told("enable_thinking", false.into()).unwrap(), quick);
        assert_eq!(told("enable_thinking", true.into()).unwrap(), plain);
        assert_eq!(told("unheard_of", 1.into()).unwrap(), plain);
        let error = told("messages", serde_json::json!([])).unwrap_err();
        assert!(error.to_string().contains("`messages`"), "{error}");
        // Special tokens are the model's unless it is told others, as in `apply_chat_template`.
        let template = ChatTemplate::new("{{ bos_token }}{{ eos_token }}", "<s>", "</s>").unwrap();
        let other = TemplateArguments::from([("bos_token".to_owned(), "<b>".into())]);
        assert_eq!(template.render_with(&[], true, &other).unwrap(), "<b></s>");
    }

    #[test]
    fn a_template_that_goes_on_and_on_is_stopped() {
        // Grows to twice as much, over and over.
        let doubling = |of: &str, to: &str, end: &str| {
            format!(
                "{{% set ns = namespace(x={of}) %}}{{% for i in range(60) %}}\
                 {{% set ns.x = {to} %}}{{% endfor %}}{end}"
            )
        };
        for source in [
            "{% for a in range(9000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}"
                .to_owned(),
            doubling("'ab'", "ns.x ~ ns.x", ""),
            doubling("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
            doubling("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson(indent=2) }}"),
        ] {
            let error = render(&source, &[]).unwrap_err().to_string();
            let said = "chat template: the model's chat template was stopped";
            assert!(error.starts_with(said), "{source}: {error}");
            assert!(error.contains("more than 5000000 instructions"), "{error}");
        }
    }

    #[test]
    fn a_chat_as_long_as_any_context_is_rendered() {
        let long = |role: &str| ChatMessage::new(role, "a word ".repeat(600_000));
        let messages = [long("user"), long("assistant"), long("user")];
        let template = ChatTemplate::new(THINKING, "", "<|im_end|>").unwrap();
        let text = template.render(&messages, true).unwrap();
        assert!(text.len() > 3 * 7 * 600_000);
        let many: Vec<ChatMessage> = (0..10_000)
            .map(|i| ChatMessage::new(["user", "assistant"][i % 2], "hm"))
            .collect();
        assert!(template.render(&many, false).is_ok());
    }

    #[test]
    fn a_refusal_carries_the_templates_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert!(
            error.to_string().contains("roles must alternate"),
            "{error}"
        );
        assert!(ChatTemplate::new("{% if %}", "", "").is_err());
    }
}
