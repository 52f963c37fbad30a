//! Conditions and reasons: one enum each, the same words in conditions, Events, metric labels and docs.

use strata_contract::FailureReason;

/// Types of conditions. All are of positive polarity; `Ready` is the conjunction of the others of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConditionType {
    /// The spec can be carried out here.
    Accepted,
    /// There are nodes of the shape that `spec.hardware` asks for; absent without it. Fullness is not judged.
    Placed,
    /// Everything that the run reads was published or is a plain URI.
    InputsReady,
    /// The current run published its artifact.
    Succeeded,
    /// InferenceService with autoscale: the pods say what scaling aims at.
    MetricsAvailable,
    /// InferenceService with autoscale: the number of pods is what scaling wants.
    ScalingEffective,
    /// InferenceService: the wanted number of pods answers with the current artifact.
    Available,
    /// All of the above.
    Ready,
}

impl ConditionType {
    /// The word in `status.conditions[].type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Placed => "Placed",
            Self::InputsReady => "InputsReady",
            Self::Succeeded => "Succeeded",
            Self::MetricsAvailable => "MetricsAvailable",
            Self::ScalingEffective => "ScalingEffective",
            Self::Available => "Available",
            Self::Ready => "Ready",
        }
    }
}

/// What a reason means for the condition that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    True,
    /// It goes on by itself: progressing, waiting or suspended.
    Unknown,
    /// It needs a person.
    False,
}

/// Declares [`Reason`] with each word's verdict and meaning in one table.
macro_rules! reasons {
    ($($name:ident $verdict:ident $meaning:literal,)*) => {
        /// Why a condition has its status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $(#[doc = $meaning] $name,)*
        }

        impl Reason {
            /// Every reason, in the order of the docs.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Status of a condition with this reason.
            pub fn verdict(self) -> Verdict {
                match self { $(Self::$name => Verdict::$verdict,)* }
            }

            /// What it means, and what to do about it.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }
        }
    };
}

reasons! {
    SpecAccepted True "The spec can be carried out.",
    SpecInvalid False "The spec breaks a rule that the server could not check; the message says what to write instead.",
    StorageMissing False "Neither spec.storage nor the operator's default says where to publish: set one.",
    EngineUnsupported False "The engine cannot do this here: the message names what can.",
    ReferenceCycle False "The resource depends on itself through its references; the message names the circle: break it.",
    Fits True "Nodes of the shape that spec.hardware asks for are there; the message names their pool.",
    WaitingForNodes Unknown "No node has the shape now; the message says whether a pool that may grow would do, or what is wrong with the nodes that would.",
    NodesUnknown Unknown "The operator serves one namespace and may not read nodes, and no pool is declared: whether anything fits is seen when the pod is scheduled.",
    NoNodeFits False "No node and no declared pool has the shape that spec.hardware asks for; the message says what is there and what would fit: change spec.hardware, or add nodes.",
    ImageMissing False "The operator has no runtime image for that accelerator: set the flag or the chart's value that the message names.",
    InputsResolved True "Every input is published.",
    ReferenceNotFound Unknown "A referenced resource does not exist (yet): apply it, or correct the name.",
    DigestNotFound False "The referenced resource did not publish the pinned digest, or more than ten publications ago: correct it or leave it out.",
    WaitingForInput Unknown "A referenced resource has not published yet; this one starts by itself when it has.",
    Blocked Unknown "A condition before this one does not hold; its message says why.",
    Suspended Unknown "spec.suspend is true.",
    Pending Unknown "The attempt's pod is not running yet; the message quotes the scheduler or the kubelet.",
    Queued Unknown "The attempt waits in its queue until Kueue lets it begin; the message quotes Kueue.",
    Preempted Unknown "Kueue took the attempt's place for other work, or drained the queue; the message quotes it. The attempt saved its work and goes on when there is room again.",
    Running Unknown "An attempt is running; see status.progress.",
    Retrying Unknown "An attempt failed and the next one starts after a pause; the message says why it failed.",
    Published True "The run published its artifact.",
    OutOfMemory False "The pod needed more memory than it may have: raise spec.pod.resources as the message says; the run then goes on from what was saved.",
    DeadlineExceeded False "The attempts took longer than spec.deadline: raise it, and the run goes on from what was saved; or make the work smaller.",
    ImagePullFailed Unknown "The pod's image cannot be pulled: correct the image in the operator's settings or the pull secrets.",
    ClaimNotFound Unknown "A PersistentVolumeClaim that a URI names does not exist: create it, or correct the URI.",
    PodLost False "The pod vanished without a report (evicted, node lost) or does not stop: see its node. More spec.retries give new attempts.",
    ConfigInvalid False "The stage cannot carry out its configuration: change the spec as the message says.",
    InputNotFound False "A URI names nothing: correct it, or put the data there and raise spec.retries.",
    InputUnreadable False "An input cannot be read: check the volume and its permissions for user 65532, then raise spec.retries.",
    InputCorrupt False "An input is damaged: replace the file, then raise spec.runGeneration.",
    ArchitectureUnsupported False "The model is of an architecture that the engine does not know: use one that the message names.",
    NothingLeft False "Curation dropped everything: relax spec.curate, or put more data there and raise spec.runGeneration.",
    GateFailed False "A gate said no; nothing was published: improve data or training, or move the gate.",
    StorageFull False "The output volume is full: free space or enlarge it, then raise spec.retries; the run goes on from what was saved.",
    StorageUnwritable False "The output volume refuses writes: check that it is mounted read-write for user 65532, then raise spec.retries.",
    Diverged False "Training diverged: lower the learning rate.",
    CheckpointCorrupt False "Every checkpoint of the run is damaged: raise spec.runGeneration to start anew.",
    Interrupted Unknown "The attempt was interrupted and saved its work; the next one goes on from there.",
    Internal False "A stage failed for another reason: read its log. More spec.retries try it again, a raised spec.runGeneration begins anew.",
    Serving True "The wanted number of pods answers with the current artifact.",
    RollingOut Unknown "Pods with the current artifact are starting.",
    ReplicasUnavailable Unknown "Fewer pods answer than are wanted; the message quotes what holds them.",
    ScaledToZero Unknown "spec.replicas is 0: nothing answers.",
    MetricsRead True "All ready pods say what spec.autoscale aims at.",
    MetricsPending Unknown "No ready pod has been asked for its metrics yet.",
    MetricsPartial Unknown "Some ready pods do not say what spec.autoscale aims at; the others do, and scaling goes on with them. The message names a silent one and quotes why.",
    MetricsSilent False "No ready pod says what spec.autoscale aims at, so the number of pods stays as it is: the message quotes why; look at the pod's /metrics.",
    ModelNameWrong False "The pods' metrics are of a model with another name, so the number of pods stays as it is: start the server with this resource's name as the name of the model (vLLM: --served-model-name).",
    MetricMissing False "The pods have no metric for one of spec.autoscale.targets: take that target away, or use a server that has it; the message has the names.",
    ScalingActive True "The number of pods follows spec.autoscale.targets.",
    AtMaximum True "More pods are needed than spec.autoscale.maxReplicas: raise it if the targets matter more than the cost.",
    OverBudget True "More pods are needed than spec.autoscale.maxAccelerators has accelerators for: raise it if the targets matter more than the cost.",
    AnotherWriter False "Something else sets the replicas of this resource's Deployment, such as a HorizontalPodAutoscaler: the message names it. Delete that one, or take spec.autoscale away and let it scale this InferenceService by /scale.",
    NameTaken False "An object that is to be made has the name of one that belongs to something else: delete or rename that one, or rename the resource.",
    Refused False "The API server refuses an object that is to be made (a rule, a policy, a quota); the message quotes it: change spec.pod, or what the message names. It is tried again.",
    ApplyFailed Unknown "The API server fails at an object that is to be made (a webhook that does not answer, a range of addresses that is full); the message quotes it. It is tried again.",
    CrashLooping False "A serving pod keeps failing: the message quotes how it ended.",
}

impl From<FailureReason> for Reason {
    fn from(reason: FailureReason) -> Self {
        match reason {
            FailureReason::ConfigInvalid => Self::ConfigInvalid,
            FailureReason::InputNotFound => Self::InputNotFound,
            FailureReason::InputUnreadable => Self::InputUnreadable,
            FailureReason::InputCorrupt => Self::InputCorrupt,
            FailureReason::ArchitectureUnsupported => Self::ArchitectureUnsupported,
            FailureReason::NothingLeft => Self::NothingLeft,
            FailureReason::GateFailed => Self::GateFailed,
            FailureReason::StorageFull => Self::StorageFull,
            FailureReason::StorageUnwritable => Self::StorageUnwritable,
            FailureReason::Diverged => Self::Diverged,
            FailureReason::CheckpointCorrupt => Self::CheckpointCorrupt,
            FailureReason::Interrupted => Self::Interrupted,
            FailureReason::Internal => Self::Internal,
        }
    }
}
