//! What the operator hands a pod and what the pod hands back. No kube, no candle.
