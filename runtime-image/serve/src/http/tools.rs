//! Tools: what a request defines, how the model is told, what its answer may then be, and which calls stand in it.
//!
//! ```text
//! tools, tool_choice ──define──▶ Tools ──format──▶ prompt, grammar ──▶ the model's text ──read──▶ content, tool_calls
//! ```
//! The grammar holds from the first token. With `auto` it lets any text pass until a call begins; from there on, as with
//! `required`, only calls of the defined functions with arguments of their schemas are possible, whatever the model.

mod define;
mod format;
mod history;
mod read;

use strata_model::Vocabulary;

pub(super) use define::{ToolFields, Tools};
use format::Format;
pub(super) use history::prepare as messages;
pub(super) use read::{Part, Reader};

use super::Served;
use super::error::ApiError;
use super::form::{self, Asked};
use super::prepare::Prepared;
use crate::engine::Form;

/// Lets the answer call the tools, or be of the form that is asked for.
pub(super) fn apply(
    served: &Served,
    prepared: &mut Prepared,
    tools: &Tools,
    asked: Option<Asked>,
) -> Result<(), ApiError> {
    let template = served.chat_template.as_ref().map_or("", |template| template.source());
    let format = Format::of(template);
    let special = special(&served.vocabulary, format);
    let form = format.grammar(tools, asked.as_ref().map(|asked| &asked.form), special);
    let constraint = form::compile(served, Asked { form, field: "tools" });
    prepared.submission.constraint = Some(constraint.map_err(|error| culprit(served, tools, asked).unwrap_or(error))?);
    // Whoever reads the calls must see where they begin.
    prepared.submission.show_special |= special.is_some();
    let names = tools.callable().map(|tool| tool.name.clone()).collect();
    prepared.reader = Some(Reader::new(format, names));
    Ok(())
}

fn special(vocabulary: &Vocabulary, format: &Format) -> Option<u32> {
    let id = vocabulary.tokenizer().token_to_id(format.trigger)?;
    vocabulary.is_special(id).then_some(id)
}

/// Which part of a grammar for calls does not compile alone either.
fn culprit(served: &Served, tools: &Tools, asked: Option<Asked>) -> Option<ApiError> {
    if let Some(Err(error)) = asked.map(|asked| form::compile(served, asked)) {
        return Some(error);
    }
    tools.told.iter().enumerate().find_map(|(i, tool)| {
        let form = Form::Schema(form::inner(tool.parameters.clone()));
        let error = served.forms.compile(form).err()?;
        let name = &tool.name;
        let message = format!("tools[{i}].function.parameters (of {name}) cannot be followed: {error}");
        Some(ApiError::invalid("tools", message))
    })
}
