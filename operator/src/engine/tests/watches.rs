//! The watches against the server in memory: what they tell, and what the next list makes good.

use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use tokio::task::JoinSet;

use super::*;
use crate::engine::kind::Key;
use crate::engine::watch::{Wake, Watches};

/// The next resource of this kind that is woken.
async fn woken(wake: &Wake, kind: ResourceKind) -> String {
    let queue = wake.queue(kind);
    let next = tokio::time::timeout(Duration::from_secs(20), queue.next()).await;
    let Key { name, .. } = next
        .inspect(|key| queue.done(key.clone(), None))
        .expect("a wake-up in time");
    name
}

#[tokio::test]
async fn what_no_watch_told_is_seen_after_the_next_list() {
    let server = world();
    assert!(round(&mut operator(&server, true)).await);
    let context = Arc::new(context(&server, true));
    let wake = Wake::default();
    let watches = Watches {
        client: context.client.clone(),
        namespace: Some("ns".into()),
        wake: wake.clone(),
        index: context.index.clone(),
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(watches.clone().resources::<Dataset>(context.clone()));
    tasks.spawn(watches.clone().resources::<PretrainJob>(context.clone()));
    tasks.spawn(watches.clone().children::<Job>(context.clone()));
    assert_eq!(woken(&wake, ResourceKind::Dataset).await, "plays");
    assert_eq!(woken(&wake, ResourceKind::PretrainJob).await, "bard");
    let bard = key(ResourceKind::PretrainJob, "bard");
    reconcile::<PretrainJob>(&bard, &context)
        .await
        .expect("it waits for its data");
    let plays = key(ResourceKind::Dataset, "plays");
    context.failures.pause(&plays);

    // A Job that vanished is in no list: its resource looks at what it has.
    let job = server.all("jobs").pop().expect("the Dataset has one");
    server.remove(&format!("jobs/{}", job["metadata"]["name"].as_str().expect("a name")));
    server.lose_events("jobs");
    assert_eq!(woken(&wake, ResourceKind::Dataset).await, "plays");

    server.remove("datasets/plays");
    server.add("datasets", json!(dataset("more", json!({}))));
    server.lose_events("datasets");
    assert_eq!(woken(&wake, ResourceKind::Dataset).await, "more");
    let datasets = context.caches.store::<Dataset>();
    assert!(datasets.contains("ns", "more") && !datasets.contains("ns", "plays"));
    assert_eq!(
        woken(&wake, ResourceKind::PretrainJob).await,
        "bard",
        "what it refers to has gone"
    );
    assert_eq!(
        context.failures.pause(&plays),
        Failures::default().pause(&plays),
        "nothing is kept of what is gone"
    );
}
