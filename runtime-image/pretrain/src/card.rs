//! The card of a pretrained model.

use std::collections::BTreeMap;
use std::fmt::Write;

use strata_contract::PretrainConfig;
use strata_model::ModelConfig;

/// Text of `README.md`: what the model is, how it was made, what it reached.
pub(crate) fn text(
    name: &str,
    config: &PretrainConfig,
    model: &ModelConfig,
    metrics: &BTreeMap<String, f64>,
) -> String {
    let datasets: Vec<&str> = config.datasets.iter().map(|input| input.name.as_str()).collect();
    let training = &config.training;
    let mut text = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [strata, pretrained]\n---\n# {name}\n\n\
         A decoder of the Llama family with {} parameters, trained from nothing on {}. It continues text in the manner of \
         that data; it was not taught to follow instructions.\n\n\
         | | |\n|---|---|\n\
         | layers, width, heads (key and value heads) | {}, {}, {} ({}) |\n\
         | vocabulary, context | {}, {} tokens |\n\
         | trained on | {} tokens in batches of {} |\n\
         | learning rate, schedule, seed | {}, {:?}, {} |\n",
        model.parameters(),
        datasets.join(", "),
        model.layers,
        model.hidden_size,
        model.heads,
        model.kv_heads,
        model.vocab_size,
        model.max_positions,
        training.tokens,
        training.batch_tokens,
        training.learning_rate,
        training.schedule,
        training.seed,
    );
    text.push_str("\nOn held-out text:\n\n| metric | value |\n|---|---|\n");
    for (metric, value) in metrics {
        writeln!(text, "| {metric} | {value:.4} |").expect("writing to a string cannot fail");
    }
    text.push_str(
        "\n`evaluation/set.json` has the tokens that these figures were measured on. `manifest.json`, in the run's folder, \
         has the inputs by digest and the whole configuration.\n",
    );
    text
}
