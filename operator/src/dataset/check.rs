//! From a Dataset's spec to the configuration of the stage `curate`.

use strata_api::{Common, Dataset, DocumentFormat, QualityOverride};
use strata_contract::{
    Card, CurateConfig, EncodeConfig, Input, Language, Packing, PiiAction, Quality, Source, SourceFormat, Stage, Task,
    Uri,
};

use crate::engine::kind::ResourceKind;
use crate::run::fields::{decimal, gates, unsigned};
use crate::run::{Engine, InputRef, RunKind, Runs};
use crate::workload::pod::Sizes;

/// Smallest confidence of a language where the spec does not say.
const DEFAULT_MIN_CONFIDENCE_PERCENT: i32 = 65;

impl RunKind for Dataset {}

impl Runs for Dataset {
    const RUN_KIND: ResourceKind = ResourceKind::Dataset;
    const SIZES: Sizes = Sizes {
        cpu_millis: 500,
        memory_mib: 512,
        memory_limit_mib: 2048,
    };

    fn common(&self) -> &Common {
        &self.spec.common
    }

    fn engine(&self) -> Result<Engine<'_>, String> {
        let engine = self.spec.engine.as_ref();
        Engine::of(
            "embedded",
            engine.and_then(|engine| engine.embedded.as_ref()),
            engine.and_then(|engine| engine.container.as_ref()),
        )
    }

    fn inputs(&self) -> Vec<InputRef> {
        Vec::new()
    }

    fn stage(&self, _: &[Input]) -> Result<Stage, String> {
        let spec = &self.spec;
        let curate = spec.curate.clone().unwrap_or_default();
        let deduplicate = curate.deduplicate.unwrap_or_default();
        let split = spec.split.clone().unwrap_or_default();
        let card = spec.card.clone().unwrap_or_default();
        let similarity = deduplicate.min_hash.map(|min_hash| min_hash.similarity_percent);
        Ok(Stage::Curate(CurateConfig {
            task: spec.task,
            sources: spec.sources.iter().map(source).collect::<Result<_, _>>()?,
            languages: curate.languages.iter().map(language).collect::<Result<_, _>>()?,
            quality: curate
                .quality
                .map(|quality| {
                    Ok::<_, String>(Quality {
                        preset: quality.preset,
                        overrides: quality
                            .overrides
                            .iter()
                            .map(quality_override)
                            .collect::<Result<_, _>>()?,
                    })
                })
                .transpose()?,
            deduplicate_exact: deduplicate.exact.unwrap_or(false),
            min_hash_similarity_percent: similarity
                .map(|percent| unsigned("spec.curate.deduplicate.minHash.similarityPercent", percent))
                .transpose()?,
            pii: curate.screen.and_then(|screen| screen.pii).unwrap_or(PiiAction::Keep),
            held_out_percent: unsigned("spec.split.heldOutPercent", split.held_out_percent)?,
            seed: unsigned("spec.split.seed", split.seed.unwrap_or(0))?,
            encode: match &spec.encode {
                None => None,
                Some(encode) => Some(EncodeConfig {
                    vocab_size: unsigned(
                        "spec.encode.tokenizer.train.vocabSize",
                        encode.tokenizer.train.vocab_size,
                    )?,
                    sequence_length_tokens: unsigned(
                        "spec.encode.sequence.lengthTokens",
                        encode.sequence.length_tokens,
                    )?,
                    packing: encode.sequence.packing.unwrap_or(Packing::BestFit),
                }),
            },
            card: Card {
                title: card.title.or_else(|| self.metadata.name.clone()).unwrap_or_default(),
                description: card.description.unwrap_or_default(),
                notice: card.notice.unwrap_or_default(),
            },
            gates: gates(&spec.gates)?,
        }))
    }

    fn vocab_size(&self) -> Option<u32> {
        u32::try_from(self.spec.encode.as_ref()?.tokenizer.train.vocab_size).ok()
    }

    fn dataset(&self) -> Option<(Task, bool)> {
        Some((self.spec.task, self.spec.encode.is_some()))
    }
}

fn source(source: &strata_api::Source) -> Result<Source, String> {
    let (uri, format) = match (&source.documents, &source.web_crawl, &source.preferences) {
        (Some(documents), None, None) => (&documents.uri, documents_format(documents)?),
        (None, Some(location), None) => (&location.uri, SourceFormat::WebCrawl),
        (None, None, Some(location)) => (&location.uri, SourceFormat::PreferenceTranscripts),
        _ => {
            return Err(format!(
                "spec.sources[{}]: exactly one of documents, webCrawl, preferences must be set",
                source.name
            ));
        }
    };
    let uri: Uri = uri
        .0
        .parse()
        .map_err(|error| format!("spec.sources[{}]: {error}", source.name))?;
    Ok(Source {
        name: source.name.clone(),
        license: source.license.clone(),
        uri,
        format,
    })
}

fn documents_format(documents: &strata_api::Documents) -> Result<SourceFormat, String> {
    Ok(match documents.format {
        DocumentFormat::Text => SourceFormat::Text {
            split_bytes: documents
                .split_bytes
                .map(|bytes| unsigned("splitBytes", bytes))
                .transpose()?,
        },
        DocumentFormat::Jsonl => SourceFormat::Jsonl {
            text_field: documents.text_field.clone().unwrap_or_else(|| "text".into()),
        },
        DocumentFormat::Html => SourceFormat::Html,
    })
}

fn language(language: &strata_api::Language) -> Result<Language, String> {
    let percent = language
        .min_confidence_percent
        .unwrap_or(DEFAULT_MIN_CONFIDENCE_PERCENT);
    Ok(Language {
        code: language.code.clone(),
        min_confidence_percent: unsigned("spec.curate.languages.minConfidencePercent", percent)?,
    })
}

fn quality_override(change: &QualityOverride) -> Result<strata_contract::QualityOverride, String> {
    let field = format!("spec.curate.quality.overrides[{:?}].threshold", change.rule);
    let threshold = change
        .threshold
        .as_ref()
        .map(|value| decimal(&field, value))
        .transpose()?;
    if threshold.is_none() && change.disabled != Some(true) {
        return Err(format!("{field}: write a threshold, or disabled: true"));
    }
    Ok(strata_contract::QualityOverride {
        rule: change.rule,
        threshold,
    })
}
