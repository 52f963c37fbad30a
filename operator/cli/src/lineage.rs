//! `strata lineage`: what a published artifact was made from, each input by digest, back to the raw files.

use anyhow::Result;
use serde::Serialize;
use strata_operator::engine::kind::{Ref, ResourceKind};

use crate::cluster::Cluster;
use crate::output::{self, Format};
use crate::resource::{self, Named, Snapshot};

/// Longest chain that is followed: a data set, a pretrained model and a few alignments are far less.
const DEPTH_LIMIT: usize = 16;

/// Whose lineage to show.
#[derive(clap::Args)]
pub struct Arguments {
    /// The resource, as inferenceservice/assistant.
    #[arg(value_name = "KIND/NAME")]
    resource: Named,
    /// How it is written.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    #[command(flatten)]
    cluster: Cluster,
}

/// Prints the tree.
pub async fn run(arguments: Arguments) -> Result<()> {
    let connection = arguments.cluster.connect().await?;
    let all = resource::snapshot(&connection).await?;
    resource::find(&all, &arguments.resource.0, &connection.namespace)?;
    let tree = tree(&all, &arguments.resource.0);
    output::write(arguments.output, &tree, |tree| text(tree, 0))
}

/// An artifact and what it was made from.
#[derive(Debug, PartialEq, Serialize)]
struct Node {
    /// What it is to the one above.
    #[serde(skip_serializing_if = "String::is_empty")]
    role: String,
    /// `Kind/name`, or a URI.
    source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// Why there are no inputs, where there should be some.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    inputs: Vec<Node>,
}

fn tree(all: &Snapshot, root: &Ref) -> Node {
    node(all, String::new(), root.to_string(), None, 0)
}

fn node(all: &Snapshot, role: String, source: String, digest: Option<String>, depth: usize) -> Node {
    let mut node = Node {
        role,
        source,
        digest,
        note: None,
        inputs: Vec::new(),
    };
    // What is no resource is a URI: the chain begins there.
    let Some(name) = named(&node.source) else { return node };
    let Some(item) = all.get(&name) else {
        node.note = Some("deleted since; the artifact's manifest.json has its inputs".into());
        return node;
    };
    match (&node.digest, &item.digest) {
        (_, None) => {
            node.note = Some(format!("nothing is published: {}", item.message));
            return node;
        }
        // Its status is about what came after: another artifact, with other inputs perhaps.
        (Some(read), Some(now)) if read != now => {
            node.note = Some(format!(
                "has published {} since; the manifest.json of this one has its inputs",
                short(now)
            ));
            return node;
        }
        (_, Some(now)) => node.digest = Some(now.clone()),
    }
    if depth < DEPTH_LIMIT {
        let inputs = item.inputs.iter();
        node.inputs = inputs
            .map(|input| {
                let source = input.resource.clone().unwrap_or_else(|| input.uri.clone());
                self::node(all, input.name.clone(), source, input.digest.clone(), depth + 1)
            })
            .collect();
    }
    node
}

/// The resource that `source` names, if it is none of the plain URIs.
fn named(source: &str) -> Option<Ref> {
    let (kind, name) = source.split_once('/').filter(|_| !source.contains("://"))?;
    Some(Ref {
        kind: ResourceKind::from_name(kind)?,
        name: name.to_owned(),
    })
}

fn text(node: &Node, depth: usize) -> String {
    let role = match node.role.as_str() {
        "" => String::new(),
        role => format!("{role}: "),
    };
    let digest = node
        .digest
        .as_deref()
        .map(|digest| format!("  {}", short(digest)))
        .unwrap_or_default();
    let note = node
        .note
        .as_deref()
        .map(|note| format!("  ({note})"))
        .unwrap_or_default();
    let mut out = format!("{}{role}{}{digest}{note}\n", "  ".repeat(depth), node.source);
    for input in &node.inputs {
        out.push_str(&text(input, depth + 1));
    }
    out
}

fn short(digest: &str) -> String {
    digest.chars().take(19).collect()
}

#[cfg(test)]
mod tests {
    use strata_api::InputStatus;

    use super::*;
    use crate::resource::Ready;
    use crate::resource::tests::row;

    fn input(name: &str, source: &str, digest: &str) -> InputStatus {
        let resource = (!source.contains("://")).then(|| source.to_owned());
        InputStatus {
            name: name.into(),
            uri: if resource.is_some() {
                format!("pvc://artifacts/{name}")
            } else {
                source.into()
            },
            digest: Some(digest.into()),
            resource,
        }
    }

    fn chain() -> Snapshot {
        let mut service = row(
            "isvc/chat",
            Ready::True,
            "Serving",
            Some("sha256:cccccccccccccccc"),
            &[],
        );
        service.1.inputs = vec![input("model", "AlignmentJob/chat", "sha256:bbbbbbbbbbbbbbbb")];
        let mut job = row(
            "aj/chat",
            Ready::True,
            "Published",
            Some("sha256:bbbbbbbbbbbbbbbb"),
            &[],
        );
        job.1.inputs = vec![
            input("base", "pvc://raw/base.gguf", "sha256:0000000000000000"),
            input("pairs", "Dataset/pairs", "sha256:aaaaaaaaaaaaaaaa"),
            input("old", "Dataset/gone", "sha256:9999999999999999"),
        ];
        let mut pairs = row(
            "dset/pairs",
            Ready::True,
            "Published",
            Some("sha256:aaaaaaaaaaaaaaaa"),
            &[],
        );
        pairs.1.inputs = vec![input("raw", "pvc://raw/pairs.jsonl", "sha256:1111111111111111")];
        [service, job, pairs].into()
    }

    #[test]
    fn every_input_is_named_by_digest_back_to_the_raw_files() {
        let expected = "\
InferenceService/chat  sha256:cccccccccccc
  model: AlignmentJob/chat  sha256:bbbbbbbbbbbb
    base: pvc://raw/base.gguf  sha256:000000000000
    pairs: Dataset/pairs  sha256:aaaaaaaaaaaa
      raw: pvc://raw/pairs.jsonl  sha256:111111111111
    old: Dataset/gone  sha256:999999999999  (deleted since; the artifact's manifest.json has its inputs)
";
        let root = named("InferenceService/chat").unwrap();
        assert_eq!(text(&tree(&chain(), &root), 0), expected);
    }

    #[test]
    fn inputs_of_another_publication_are_not_passed_off_as_those_of_this_one() {
        let mut all = chain();
        all.get_mut(&named("Dataset/pairs").unwrap()).unwrap().digest = Some("sha256:ffffffffffffffff".into());
        let text = text(&tree(&all, &named("AlignmentJob/chat").unwrap()), 0);
        assert!(
            text.contains("sha256:aaaaaaaaaaaa  (has published sha256:ffffffffffff since"),
            "{text}"
        );
        assert!(!text.contains("pairs.jsonl"), "{text}");
    }
}
