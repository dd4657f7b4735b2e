//! `/metrics` over HTTP: one page, few connections, short ones.

use super::exposition::exposition;
use super::fleet::Fleet;
use crate::error::{Error, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};

/// What OpenMetrics is called in HTTP.
const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The most connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 8;

/// How long a connection may take in all: a scrape takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the figures of a fleet until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at this address.
    ///
    /// # Errors
    /// `Host` when it cannot.
    pub fn start(address: SocketAddr, fleet: Fleet) -> Result<Self> {
        let cannot = |error: std::io::Error| {
            Error::Host(format!("metrics cannot be served at {address}: {error}; say another with --metrics"))
        };
        let listener = TcpListener::bind(address).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(cannot)?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        // The other end says nothing; it is dropped.
                        _ = stopped => {}
                        () = accept(listener, fleet) => {}
                    }
                });
                runtime.shutdown_background();
            })
            .map_err(cannot)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens, with the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends by the line above, and has nothing to say.
            thread.join().ok();
        }
    }
}

async fn accept(listener: TcpListener, fleet: Fleet) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "metrics are not served"),
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a scrape could not be taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let fleet = fleet.clone();
        tokio::spawn(async move {
            let service =
                service_fn(move |request| std::future::ready(Ok::<_, Infallible>(answer(&request, &fleet))));
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .max_buf_size(16 << 10);
            let serving = http.serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(PATIENCE, serving).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a scrape failed"),
                Err(_) => tracing::debug!("a scrape took too long"),
            }
            drop(place);
        });
    }
}

fn answer(request: &Request<Incoming>, fleet: &Fleet) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::from(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "only /metrics is here\n");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is possible\n");
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match exposition(fleet) {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(CONTENT));
            response
        }
        Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the figures could not be written\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    fn ask(server: &Server, request: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn one_page_is_served_and_nothing_else() {
        let server = Server::start("127.0.0.1:0".parse().unwrap(), Fleet::default()).unwrap();
        // Silent ones are as many as there is room for but one.
        let silent: Vec<_> =
            (1..MAX_CONNECTIONS).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
        let page = ask(&server, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(page.starts_with("HTTP/1.1 200") && page.ends_with("# EOF\n"), "{page}");
        assert!(page.contains(&format!("content-type: {CONTENT}")), "{page}");
        for (request, status) in [
            ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404"),
            ("GET /metrics/../etc HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404"),
            ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 405"),
            ("nonsense\r\n\r\n", "HTTP/1.1 400"),
        ] {
            let answer = ask(&server, request);
            assert!(answer.starts_with(status), "{request}: {answer}");
        }
        drop(silent);
        let address = server.address();
        drop(server);
        assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
    }
}
