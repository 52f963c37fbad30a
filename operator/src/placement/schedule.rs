//! From a demand to the rules that the scheduler goes by: they follow from the table, not from the nodes of the moment.

use k8s_openapi::api::core::v1::{
    Affinity, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PreferredSchedulingTerm, Taint,
    Toleration,
};
use strata_api::{Capacity, Need};

use super::table::{Accelerator, Family, Label, Mark, Table};
use super::{Demand, Placement};

/// Weight of what is preferred: spot nodes where both are allowed.
const SPOT_WEIGHT: i32 = 100;
/// Weight of an interconnect that is preferred.
const INTERCONNECT_WEIGHT: i32 = 50;
/// Label by which nodes are kept away from.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// GPU feature discovery says `single` where every GPU of a node is cut into equal parts that look like whole ones.
const MIG_STRATEGY: &str = "nvidia.com/mig.strategy";

/// What pods on that accelerator tolerate; taints of spot nodes only where those are wanted.
pub fn tolerations(row: &Accelerator, capacity: Capacity, spot: &[Label]) -> Vec<Toleration> {
    let toleration = |key: &str, value: Option<&String>| Toleration {
        key: Some(key.to_owned()),
        operator: Some(if value.is_some() { "Equal" } else { "Exists" }.into()),
        value: value.cloned(),
        ..Toleration::default()
    };
    let spot = spot.iter().filter(|_| capacity != Capacity::OnDemand);
    let own = row
        .tolerations
        .iter()
        .map(|taint| toleration(&taint.key, taint.value.as_ref()));
    own.chain(spot.map(|label| toleration(&label.key, Some(&label.value))))
        .collect()
}

/// The API's own rule.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let same = |theirs: &Option<String>, ours: &str| {
        theirs
            .as_deref()
            .is_none_or(|theirs| theirs.is_empty() || theirs == ours)
    };
    let value = toleration.operator.as_deref() == Some("Exists")
        || toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or("");
    same(&toleration.effect, &taint.effect) && same(&toleration.key, &taint.key) && value
}

fn rule(key: &str, operator: &str, values: &[String]) -> NodeSelectorRequirement {
    NodeSelectorRequirement {
        key: key.to_owned(),
        operator: operator.to_owned(),
        values: (!values.is_empty()).then(|| values.to_vec()),
    }
}

/// The rules about nodes, sick ones apart. `by_label`: InfiniBand is not asked for as a resource.
pub fn affinity(demand: &Demand, row: &Accelerator, table: &Table, by_label: bool) -> Option<Affinity> {
    let is = |label: &Label| rule(&label.key, "In", std::slice::from_ref(&label.value));
    let is_not = |label: &Label| rule(&label.key, "NotIn", std::slice::from_ref(&label.value));
    let needs_infiniband = demand.infiniband == Some(Need::Required);
    let all = |mark: &Mark| {
        let mut rules = vec![rule(&mark.key, "In", &mark.values)];
        if needs_infiniband && by_label && mark.infiniband.is_none() {
            rules.push(is(&table.infiniband.label));
        }
        rules
    };
    let marks = row.marks.iter().filter(|mark| {
        (demand.nvlink != Some(Need::Required) || mark.nvlink)
            && !(needs_infiniband && by_label && mark.infiniband == Some(false))
    });
    // One of the alternatives must hold: each a way in which a node may say what it has.
    let mut ways: Vec<Vec<NodeSelectorRequirement>> = match row.family {
        Family::Cpu => vec![Vec::new()],
        _ => marks.map(all).collect(),
    };
    let mut common = Vec::new();
    if let Some(slice) = &demand.topology {
        common.push(rule(&table.topology_label, "In", std::slice::from_ref(&slice.text)));
    }
    if row.family == Family::Cuda && demand.mig_profile.is_none() {
        common.push(rule(MIG_STRATEGY, "NotIn", &["single".to_owned()]));
    }
    match demand.capacity {
        Capacity::OnDemand => common.extend(table.spot.iter().map(is_not)),
        Capacity::Spot => {
            let both = |way: &Vec<NodeSelectorRequirement>, label: &Label| {
                way.iter().cloned().chain([is(label)]).collect::<Vec<_>>()
            };
            ways = ways
                .iter()
                .flat_map(|way| table.spot.iter().map(move |label| both(way, label)))
                .collect();
        }
        Capacity::Any => {}
    }
    let term = |rules: Vec<NodeSelectorRequirement>| NodeSelectorTerm {
        match_expressions: Some(rules),
        ..NodeSelectorTerm::default()
    };
    let required: Vec<NodeSelectorTerm> = ways
        .into_iter()
        .map(|way| way.into_iter().chain(common.iter().cloned()).collect::<Vec<_>>())
        .filter(|rules| !rules.is_empty())
        .map(term)
        .collect();
    let prefer = |weight: i32, rules: Vec<NodeSelectorRequirement>| PreferredSchedulingTerm {
        weight,
        preference: term(rules),
    };
    let mut preferred = Vec::new();
    if demand.capacity == Capacity::Any {
        preferred.extend(table.spot.iter().map(|label| prefer(SPOT_WEIGHT, vec![is(label)])));
    }
    if demand.nvlink == Some(Need::Preferred) {
        let joined = row.marks.iter().filter(|mark| mark.nvlink);
        preferred.extend(joined.map(|mark| prefer(INTERCONNECT_WEIGHT, vec![rule(&mark.key, "In", &mark.values)])));
    }
    if demand.infiniband == Some(Need::Preferred) {
        let joined = row.marks.iter().filter(|mark| mark.infiniband == Some(true));
        preferred.extend(joined.map(|mark| prefer(INTERCONNECT_WEIGHT, vec![rule(&mark.key, "In", &mark.values)])));
        preferred.push(prefer(INTERCONNECT_WEIGHT, vec![is(&table.infiniband.label)]));
    }
    if required.is_empty() && preferred.is_empty() {
        return None;
    }
    Some(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: (!required.is_empty()).then_some(NodeSelector {
                node_selector_terms: required,
            }),
            preferred_during_scheduling_ignored_during_execution: (!preferred.is_empty()).then_some(preferred),
        }),
        ..Affinity::default()
    })
}

impl Placement {
    /// The rules about nodes, those included that are to be avoided.
    pub fn node_affinity(&self) -> Option<Affinity> {
        let mut affinity = self.affinity.clone();
        if self.avoid.is_empty() {
            return affinity;
        }
        let away = rule(HOSTNAME, "NotIn", &self.avoid);
        let nodes = affinity.get_or_insert_default().node_affinity.get_or_insert_default();
        let terms = &mut nodes
            .required_during_scheduling_ignored_during_execution
            .get_or_insert_default()
            .node_selector_terms;
        if terms.is_empty() {
            terms.push(NodeSelectorTerm::default());
        }
        for term in terms {
            term.match_expressions.get_or_insert_default().push(away.clone());
        }
        affinity
    }
}

/// What a pod template asks of its node besides the nodes that it avoids.
pub fn chosen(affinity: Option<&Affinity>) -> Vec<Vec<NodeSelectorRequirement>> {
    let required = affinity
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|nodes| nodes.required_during_scheduling_ignored_during_execution.as_ref());
    let terms = required.iter().flat_map(|required| &required.node_selector_terms);
    let rules = terms.map(|term| {
        let rules = term.match_expressions.iter().flatten();
        let chosen = rules.filter(|rule| rule.key != HOSTNAME || rule.operator != "NotIn");
        chosen.cloned().collect::<Vec<_>>()
    });
    rules.filter(|rules| !rules.is_empty()).collect()
}

/// The nodes that a pod template avoids.
pub fn avoided(affinity: Option<&Affinity>) -> Vec<String> {
    let terms = affinity
        .and_then(|affinity| {
            affinity
                .node_affinity
                .as_ref()?
                .required_during_scheduling_ignored_during_execution
                .as_ref()
        })
        .map(|selector| selector.node_selector_terms.as_slice());
    let first = terms.and_then(|terms| terms.first()?.match_expressions.as_ref());
    let away = first.and_then(|rules| {
        rules
            .iter()
            .find(|rule| rule.key == HOSTNAME && rule.operator == "NotIn")
    });
    away.and_then(|rule| rule.values.clone()).unwrap_or_default()
}
