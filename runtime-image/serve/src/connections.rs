//! Connections: how many there are, and how long each may take to shake hands and to send a request's headers. Without such
//! bounds, a client that sends a byte now and then holds a server for ever.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::tls::Certificate;

/// How long a client may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What bounds connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Connections at once. More wait in the system's queue of the socket.
    pub(crate) most: usize,
    /// How long a connection may take until it has sent the headers of its next request.
    pub(crate) headers: Duration,
}

/// Serves until `stopped`, then until every connection has ended its request.
pub(crate) async fn serve(
    mut listener: TcpListener,
    certificate: Option<Certificate>,
    router: Router,
    bounds: Bounds,
    mut stopped: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(bounds.most));
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, Listener::accept(&mut listener).await)
        };
        let (place, (stream, address)) = tokio::select! {
            next = next => next,
            // An error means that the server itself is gone.
            _ = stopped.wait_for(|stop| *stop) => break,
        };
        let connection = Connection {
            address,
            router: router.clone(),
            headers: bounds.headers,
            stopped: stopped.clone(),
        };
        let certificate = certificate.as_ref().map(|certificate| certificate.get());
        tokio::spawn(async move {
            let _place = place;
            connection.shake_hands(stream, certificate).await;
        });
    }
    drop(listener);
    // Every place is free again when every connection has ended.
    let all = u32::try_from(bounds.most).unwrap_or(u32::MAX);
    let _ = places.acquire_many(all).await;
}

struct Connection {
    address: SocketAddr,
    router: Router,
    headers: Duration,
    stopped: watch::Receiver<bool>,
}

impl Connection {
    async fn shake_hands(self, stream: TcpStream, certificate: Option<Arc<ServerConfig>>) {
        // A token is sent as soon as it is there, not when a packet is full.
        let _ = stream.set_nodelay(true);
        let address = self.address;
        let Some(certificate) = certificate else {
            return self.talk(stream).await;
        };
        match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(certificate).accept(stream)).await {
            Ok(Ok(stream)) => self.talk(stream).await,
            Ok(Err(error)) => tracing::debug!(%address, %error, "no TLS handshake"),
            Err(_) => tracing::debug!(%address, "no TLS handshake in time"),
        }
    }

    async fn talk(mut self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(self.headers);
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(self.router));
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            _ = self.stopped.wait_for(|stop| *stop) => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(address = %self.address, %error, "a connection ended");
        }
    }
}
