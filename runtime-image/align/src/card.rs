//! The card of an aligned model.

use std::collections::BTreeMap;
use std::fmt::Write;

use strata_contract::AlignConfig;

use crate::base::Base;

/// Text of `README.md`: what the model is, how it was made, what it reached.
pub(crate) fn text(name: &str, config: &AlignConfig, base: &Base, metrics: &BTreeMap<String, f64>) -> String {
    let datasets: Vec<&str> = config.datasets.iter().map(|input| input.name.as_str()).collect();
    let training = &config.training;
    let origin = base
        .quantized_from
        .as_ref()
        .map_or(String::new(), |formats| format!(", dequantized from {formats}"));
    let mut text = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [strata, dpo, lora]\n---\n# {name}\n\n\
         The model at `{}` ({} parameters{origin}), moved towards the preferences of {} by direct preference optimization \
         (Rafailov et al. 2023) of a LoRA adapter. The adapter, as PEFT reads it, is in `adapter/`; the weights here have it \
         merged. They are F32, because the adapter moves most weights by less than BF16 can hold.\n\n\
         What the licences and cards of the base and of the data sets say about their use holds for this model too.\n\n\
         | | |\n|---|---|\n\
         | method | {:?} |\n\
         | adapter | rank {}, alpha {}, on all linear layers |\n\
         | pairs, of at most … tokens, in batches of | {}, {}, {} |\n\
         | learning rate, schedule, seed | {}, {:?}, {} |\n\
         \nOn held-out pairs and text:\n\n| metric | value |\n|---|---|\n",
        config.base.uri,
        base.body.layout().len(),
        datasets.join(", "),
        config.method,
        config.adapter.rank,
        config.adapter.alpha,
        metrics.get("pairsTrained").copied().unwrap_or_default(),
        training.max_pair_tokens,
        training.batch_pairs,
        training.learning_rate,
        training.schedule,
        training.seed,
    );
    for (metric, value) in metrics {
        writeln!(text, "| {metric} | {value:.4} |").expect("writing to a string cannot fail");
    }
    text.push_str(
        "\n`rewardMargin` is beta times how much more likely, against the base, the chosen answer became than the rejected one; \
         Low and High are its 95 % confidence interval. `alignmentTax` is bits per byte of held-out text after minus before. \
         `evaluation/set.json` has the tokens that these figures were measured on.\n",
    );
    text
}
