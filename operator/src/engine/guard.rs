//! The guard on writes: who does not lead, writes nothing.
//!
//! A Lease coordinates, it does not fence: between losing it and noticing, a reconcile may be under way. The guard
//! stands in the client itself, so that no code can write around it. What slips through in that moment is safe by
//! deterministic names and by preconditions on UID and resourceVersion.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use axum::http::{Method, Request};
use futures::future::{Either, Ready, ready};
use kube::client::Body;
use tower::{BoxError, Layer, Service};

/// Whether this replica leads.
#[derive(Clone, Debug, Default)]
pub struct Leadership(Arc<AtomicBool>);

impl Leadership {
    /// Sets it.
    pub fn set(&self, leads: bool) {
        self.0.store(leads, Ordering::SeqCst);
    }

    /// Reads it.
    pub fn leads(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A write was refused because this replica does not lead.
#[derive(Debug, thiserror::Error)]
#[error("this replica does not lead, so it writes nothing")]
pub struct NotLeading;

/// Puts a [`Guard`] before a client's service.
#[derive(Clone, Debug)]
pub struct GuardLayer(pub Leadership);

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard {
            inner,
            leadership: self.0.clone(),
        }
    }
}

/// Refuses writes while this replica does not lead.
#[derive(Clone, Debug)]
pub struct Guard<S> {
    inner: S,
    leadership: Leadership,
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future =
        Either<Ready<Result<S::Response, BoxError>>, futures::future::MapErr<S::Future, fn(S::Error) -> BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.method() != Method::GET && !self.leadership.leads() {
            return Either::Left(ready(Err(NotLeading.into())));
        }
        let into: fn(S::Error) -> BoxError = Into::into;
        Either::Right(futures::TryFutureExt::map_err(self.inner.call(request), into))
    }
}
