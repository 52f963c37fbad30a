//! What serving pods load beside the model: LoRA adapters, and a model that drafts.
//!
//! None of it is part of the preparing run: a new adapter is a rollout, not another quantization. What has not published yet
//! holds nothing up: the pods serve without it, condition InputsReady says so, and they are rolled out once it has.

use std::collections::BTreeSet;

use kube::ResourceExt;
use serde_json::{Value, json};
use strata_api::{InferenceService, InputStatus, Reason, RunStatus, Speculation};
use strata_contract::Input;

use crate::engine::kind::{Observed, Refusal, ResourceKind};
use crate::run::check::resolve_or_remember;
use crate::run::fields::unsigned;
use crate::run::{InputRef, Source};

/// What an adapter is called among the inputs, before its own name.
const ADAPTER: &str = "adapters/";
/// What the model that drafts is called among them.
const DRAFT_MODEL: &str = "draftModel";
/// The highest rank that an AlignmentJob may have: so the server takes what one published.
const MAX_LORA_RANK: u32 = 1024;
/// Tokens guessed at once where the spec does not say, from the text and by a model.
const DEFAULT_NGRAM_DRAFTS: i32 = 4;
const DEFAULT_MODEL_DRAFTS: i32 = 3;
/// The ends of a text that are looked up where the spec does not say.
const DEFAULT_LONGEST_LOOKUP: i32 = 4;
const DEFAULT_SHORTEST_LOOKUP: i32 = 2;

/// What is loaded beside the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Beside {
    /// The adapters that are there, by name.
    pub adapters: Vec<(String, Input)>,
    /// How tokens are guessed, if that can be done yet.
    pub guess: Option<Guess>,
    /// The first of them that is not there: reason and message for condition InputsReady.
    pub missing: Option<(Reason, String)>,
}

/// How tokens are guessed.
#[derive(Clone, Debug, PartialEq)]
pub enum Guess {
    /// From the text itself.
    Ngram {
        /// Tokens guessed at once.
        drafts: u32,
        /// The longest end of the text that is looked for.
        longest: u32,
        /// The shortest one.
        shortest: u32,
    },
    /// By a smaller model.
    Model {
        /// Tokens guessed at once.
        drafts: u32,
        /// The model.
        model: Input,
    },
}

/// What the spec names beside the model.
pub fn inputs(service: &InferenceService) -> Vec<InputRef> {
    let adapter = |adapter: &strata_api::ServedAdapter| {
        let name = format!("{ADAPTER}{}", adapter.name);
        match (&adapter.alignment_job, &adapter.uri) {
            (Some(reference), None) => Some(InputRef::artifact(&name, ResourceKind::AlignmentJob, reference)),
            (None, Some(uri)) => Some(InputRef {
                name,
                source: Source::Plain(uri.0.clone()),
            }),
            _ => None,
        }
    };
    let speculation = service.spec.speculation.as_ref();
    let draft = speculation.and_then(|speculation| speculation.draft_model.as_ref());
    let draft = draft.and_then(|draft| InputRef::model(DRAFT_MODEL, &draft.model));
    service.spec.adapters.iter().filter_map(adapter).chain(draft).collect()
}

/// Judges what the spec names beside the model.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn check(service: &InferenceService, observed: &Observed) -> Result<Beside, String> {
    let names: BTreeSet<&str> = service
        .spec
        .adapters
        .iter()
        .map(|adapter| adapter.name.as_str())
        .collect();
    if names.len() != service.spec.adapters.len() || names.contains(service.name_any().as_str()) {
        return Err("spec.adapters: each needs a name of its own, other than the resource's".into());
    }
    let wanted = inputs(service);
    let draft_model = service
        .spec
        .speculation
        .as_ref()
        .and_then(|all| all.draft_model.as_ref());
    if wanted.len() != service.spec.adapters.len() + usize::from(draft_model.is_some()) {
        return Err("spec.adapters: exactly one of alignmentJob, uri must be set; spec.speculation.draftModel.model: of pretrainJob, alignmentJob, uri".into());
    }
    let none = RunStatus::default();
    let status = service.status.as_ref().map_or(&none, |status| &status.run_status);
    let namespace = service.namespace().unwrap_or_default();
    let mut beside = Beside::default();
    let mut draft = None;
    for input in wanted {
        match resolve_or_remember(&input, &namespace, status, observed) {
            Ok(found) => match input.name.strip_prefix(ADAPTER) {
                Some(name) => beside.adapters.push((name.to_owned(), found)),
                None => draft = Some(found),
            },
            Err(Refusal::Spec(_, message)) => return Err(message),
            // Inputs have no place of their own; a placement is not judged there.
            Err(Refusal::Placement(misfit)) => return Err(misfit.message),
            Err(Refusal::Inputs(reason, message)) => {
                let message = format!("{message}; until then the pods serve without it");
                beside.missing.get_or_insert((reason, message));
            }
        }
    }
    beside.guess = guess(service.spec.speculation.as_ref(), draft)?;
    Ok(beside)
}

fn guess(speculation: Option<&Speculation>, draft: Option<Input>) -> Result<Option<Guess>, String> {
    let Some(speculation) = speculation else {
        return Ok(None);
    };
    let number = |name: &str, value: Option<i32>, default| {
        unsigned(&format!("spec.speculation.{name}"), value.unwrap_or(default))
    };
    match (&speculation.ngram, &speculation.draft_model) {
        (Some(ngram), None) => Ok(Some(Guess::Ngram {
            drafts: number("ngram.draftTokens", ngram.draft_tokens, DEFAULT_NGRAM_DRAFTS)?,
            longest: number("ngram.maxLookupTokens", ngram.max_lookup_tokens, DEFAULT_LONGEST_LOOKUP)?,
            shortest: number(
                "ngram.minLookupTokens",
                ngram.min_lookup_tokens,
                DEFAULT_SHORTEST_LOOKUP,
            )?,
        })),
        (None, Some(by_model)) => {
            let drafts = number("draftModel.draftTokens", by_model.draft_tokens, DEFAULT_MODEL_DRAFTS)?;
            Ok(draft.map(|model| Guess::Model { drafts, model }))
        }
        _ => Err("spec.speculation: exactly one of ngram, draftModel must be set".into()),
    }
}

impl Beside {
    /// All that is read from storage.
    pub fn read(&self) -> impl Iterator<Item = &Input> {
        let draft = match &self.guess {
            Some(Guess::Model { model, .. }) => Some(model),
            _ => None,
        };
        self.adapters.iter().map(|(_, input)| input).chain(draft)
    }

    /// Memory that it needs, given the size of the served file. The sizes of what was published are no measure: an
    /// AlignmentJob's holds a whole model beside the adapter.
    pub fn bytes(&self, artifact_bytes: u64) -> u64 {
        let adapters = self.adapters.len() as u64 * (artifact_bytes / 4);
        let draft = matches!(self.guess, Some(Guess::Model { .. })).then_some(artifact_bytes);
        adapters.saturating_add(draft.unwrap_or(0))
    }

    /// The status' inputs: those of the run, and after them what is loaded beside its artifact.
    pub fn show(&self, inputs: &mut Vec<InputStatus>) {
        inputs.retain(|input| !input.name.starts_with(ADAPTER) && input.name != DRAFT_MODEL);
        inputs.extend(self.read().map(crate::run::report::input));
    }

    /// The server's arguments.
    pub fn arguments(&self) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        if !self.adapters.is_empty() {
            let (most, rank) = (self.adapters.len().to_string(), MAX_LORA_RANK.to_string());
            let options = [
                "--enable-lora",
                "--max-loras",
                &most,
                "--max-lora-rank",
                &rank,
                "--lora-modules",
            ];
            words.extend(options.map(str::to_owned));
            words.extend(
                self.adapters
                    .iter()
                    .map(|(name, input)| place(json!({ "name": name }), "path", input).to_string()),
            );
        }
        let speculation = match &self.guess {
            None => return words,
            Some(Guess::Ngram {
                drafts,
                longest,
                shortest,
            }) => json!({
                "method": "ngram",
                "num_speculative_tokens": drafts,
                "prompt_lookup_max": longest,
                "prompt_lookup_min": shortest,
            }),
            Some(Guess::Model { drafts, model }) => {
                let config = json!({ "method": "draft_model", "num_speculative_tokens": drafts });
                place(config, "model", model)
            }
        };
        words.extend(["--speculative-config".to_owned(), speculation.to_string()]);
        words
    }
}

/// Says where an input is, under the word `field`, and which digest it must have.
fn place(mut object: Value, field: &str, input: &Input) -> Value {
    object[field] = json!(input.uri.to_string());
    if let Some(digest) = &input.digest {
        object["digest"] = json!(digest);
    }
    object
}
