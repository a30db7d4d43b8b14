//! Listening, connections, and the end. START HERE: [`Server::run`].

use crate::app::{App, Shared};
use crate::options::{Address, Limits, ServedModel, ServerOptions};
use crate::router::router;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_io_timeout::TimeoutStream;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 4096;
/// Pause after the system could not give a connection, for want of file descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time for answers that were cut off to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Threads for work that would hold up connections.
const ASIDE_THREADS: usize = 8;

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, or is none of this machine.
    #[error("cannot listen on {address}: {problem}")]
    Listen {
        /// What was asked for.
        address: String,
        /// What the system says.
        problem: io::Error,
    },
    /// The system gives no threads or signals.
    #[error("cannot start the server: {0}")]
    System(#[from] io::Error),
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Asked to, after what it had begun.
    Drained,
    /// Asked twice, at once.
    AtOnce,
}

/// What ends a server: the first time after what it has begun, the second time at once.
pub struct Stop(Asked);

enum Asked {
    Signals,
    Channel(UnboundedReceiver<()>),
}

/// Ends a server from within its process.
#[derive(Clone, Debug)]
pub struct StopHandle(UnboundedSender<()>);

impl Stop {
    /// SIGTERM or SIGINT.
    pub fn signals() -> Self {
        Stop(Asked::Signals)
    }

    /// A handle.
    pub fn channel() -> (StopHandle, Self) {
        let (sender, receiver) = unbounded_channel();
        (StopHandle(sender), Stop(Asked::Channel(receiver)))
    }
}

impl StopHandle {
    /// Asks the server to end.
    pub fn stop(&self) {
        // It may have ended already.
        let _ = self.0.send(());
    }
}

/// An address that is taken, where nobody is answered yet.
pub struct Server {
    socket: Socket,
    name: String,
}

enum Socket {
    Tcp(TcpSocket),
    Unix(PathBuf, std::os::unix::net::UnixListener),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Server {
    /// Takes an address, so that a wrong one is found before a model is loaded.
    pub fn bind(address: &Address) -> Result<Self, ServeError> {
        let problem = |problem| ServeError::Listen { address: address.to_string(), problem };
        let (socket, name) = match address {
            Address::Tcp { host, port } => {
                let socket = bind_tcp(host, *port).map_err(problem)?;
                let name = format!("http://{}", socket.local_addr().map_err(problem)?);
                (Socket::Tcp(socket), name)
            }
            Address::Unix(path) => {
                let listener = bind_unix(path).map_err(problem)?;
                (Socket::Unix(path.clone(), listener), format!("unix:{}", path.display()))
            }
        };
        Ok(Server { socket, name })
    }

    /// The address, as a client would write it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Serves until it is stopped. `listening` is called when clients can connect.
    pub fn run(
        self,
        model: ServedModel,
        options: ServerOptions,
        stop: Stop,
        listening: impl FnOnce(),
    ) -> Result<Ended, ServeError> {
        let app = Arc::new(App::new(model, options));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .thread_name("http")
            .max_blocking_threads(ASIDE_THREADS)
            .build()?;
        let ended = runtime.block_on(serve(self, app, stop, listening));
        // Whatever still runs has been told to end, and nobody waits for it.
        runtime.shutdown_background();
        ended
    }
}

async fn serve(
    server: Server,
    app: Shared,
    stop: Stop,
    listening: impl FnOnce(),
) -> Result<Ended, ServeError> {
    raise_descriptor_limit();
    let mut stops = stop.begin()?;
    let name = server.name;
    let problem = |problem| ServeError::Listen { address: name.clone(), problem };
    let (listener, path) = match server.socket {
        Socket::Tcp(socket) => (Listener::Tcp(socket.listen(BACKLOG).map_err(problem)?), None),
        Socket::Unix(path, listener) => {
            (Listener::Unix(UnixListener::from_std(listener).map_err(problem)?), Some(path))
        }
    };
    listening();
    let limits = app.options.limits;
    let (router, connections) = (router(app.clone()), GracefulShutdown::new());
    tokio::select! {
        () = accept(listener, &router, &connections, limits) => {}
        () = stops.next() => {}
    }
    // Nobody can connect any more: the listener is gone.
    if let Some(path) = path {
        let _ = std::fs::remove_file(path);
    }
    app.start_draining();
    tracing::info!(target: "epsmoe::server", "shutting down: running requests go to their end");
    tokio::select! {
        () = drain(&app, connections) => Ok(Ended::Drained),
        () = stops.next() => Ok(Ended::AtOnce),
    }
}

/// Lets connections end within the time they have, then tells those that are left.
async fn drain(app: &Shared, connections: GracefulShutdown) {
    let patience = app.options.shutdown_timeout;
    let all_closed = connections.shutdown();
    tokio::pin!(all_closed);
    let in_time = tokio::time::timeout(patience, &mut all_closed).await.is_ok();
    let engine = app.model.engine.clone();
    let stopped = tokio::task::spawn_blocking(move || engine.shutdown());
    if !in_time {
        let _ = tokio::time::timeout(LAST_WORDS, &mut all_closed).await;
    }
    let _ = stopped.await;
}

impl Stop {
    /// From here on signals are heard.
    fn begin(self) -> io::Result<Stops> {
        Ok(match self.0 {
            Asked::Signals => Stops::Signals {
                interrupt: signal(SignalKind::interrupt())?,
                terminate: signal(SignalKind::terminate())?,
            },
            Asked::Channel(receiver) => Stops::Channel(receiver),
        })
    }
}

enum Stops {
    Signals { interrupt: Signal, terminate: Signal },
    Channel(UnboundedReceiver<()>),
}

impl Stops {
    async fn next(&mut self) {
        match self {
            Stops::Signals { interrupt, terminate } => tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            },
            // Whoever has forgotten the handle cannot stop the server.
            Stops::Channel(receiver) => match receiver.recv().await {
                Some(()) => {}
                None => std::future::pending().await,
            },
        }
    }
}

/// Gives every connection a task, for ever.
async fn accept(listener: Listener, router: &Router, connections: &GracefulShutdown, limits: Limits) {
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(target: "epsmoe::server", %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_buf_size(limits.header_bytes)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router.clone()));
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(target: "epsmoe::server", %error, "a connection broke");
            }
            drop(place);
        });
    }
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

impl Listener {
    async fn accept(&self) -> io::Result<std::pin::Pin<Box<dyn Stream>>> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Tokens are small, and should not wait for more.
                stream.set_nodelay(true)?;
                Ok(Box::pin(stream))
            }
            Listener::Unix(listener) => Ok(Box::pin(listener.accept().await?.0)),
        }
    }
}

fn bind_tcp(host: &str, port: u16) -> io::Result<TcpSocket> {
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        let bound = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }
        .and_then(|socket| {
            // Connections of a server that has ended do not keep the port.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => return Ok(socket),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

/// Takes a path, where a server that has ended may have left its socket.
fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let left_over = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if left_over && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Every connection is a file descriptor: as many as the system allows.
fn raise_descriptor_limit() {
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(target: "epsmoe::server", %error, "cannot raise the limit of open files");
    }
}
