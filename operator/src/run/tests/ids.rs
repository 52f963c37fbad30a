//! The ids of the samples' runs, written down: an operator that gives another one computes everything anew.

use serde::de::DeserializeOwned;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};

use crate::engine::kind::{Kind, Observed, ResourceKind};
use crate::fixtures::{env, published, to};
use crate::run::Runs;
use crate::run::check::check;

fn id<T: Runs + Kind + DeserializeOwned>(yaml: &str) -> String {
    let resource: T = serde_yaml::from_str(yaml).expect("a sample is a resource");
    let upstream = [
        (to(ResourceKind::Dataset, "plays"), published('a')),
        (to(ResourceKind::Dataset, "preferences"), published('b')),
        (to(ResourceKind::PretrainJob, "bard"), published('c')),
        (to(ResourceKind::AlignmentJob, "assistant"), published('d')),
    ];
    let observed = Observed {
        upstream: upstream.into(),
        ..Observed::default()
    };
    check(&resource, &observed, &env()).expect("a sample is good").run_id
}

macro_rules! sample {
    ($name:literal) => {
        include_str!(concat!("../../../../config/samples/", $name, ".yaml"))
    };
}

#[test]
fn the_runs_of_the_samples_have_the_ids_that_they_always_had() {
    let ids = [
        id::<Dataset>(sample!("dataset-plays")),
        id::<Dataset>(sample!("dataset-preferences")),
        id::<PretrainJob>(sample!("pretrainjob-bard")),
        id::<AlignmentJob>(sample!("alignmentjob-assistant")),
        id::<InferenceService>(sample!("inferenceservice-assistant")),
    ];
    // Whoever changes a sample, and nothing else, writes its new id down here.
    let known = [
        "fbc61aca411d8bb5",
        "1a09cc3661a72844",
        "371f69fe7fdc2c45",
        "07708455a9ab1988",
        "99ddd0dff34da2ce",
    ];
    assert_eq!(ids, known);
}
