//! An address that other processes of the world come to, and nobody else gets in at.

use super::secret::{Secret, let_in};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections that may be at the door at once; who comes then is sent away unheard, and may come again.
const MOST_AT_ONCE: usize = 64;

/// Lets those in who know the secret, from a thread of its own, until it is dropped.
pub(crate) struct Door {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    strangers: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// Opens it; `admit` is called with every connection that was let in, on a thread of the connection's own.
    pub(crate) fn open(
        listener: TcpListener,
        secret: Secret,
        admit: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (closed, strangers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let guard = Guard { secret, admit, closed: Arc::clone(&closed), strangers: Arc::clone(&strangers) };
        let stand = move || Arc::new(guard).stand(&listener);
        let thread = std::thread::Builder::new().name("door".into()).spawn(stand)?;
        Ok(Door { address, closed, strangers, thread: Some(thread) })
    }

    /// Where it is.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many were turned away.
    pub(crate) fn strangers(&self) -> usize {
        self.strangers.load(Ordering::Relaxed)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        // Whoever waits for a connection sees by one that it is closed.
        let woken = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

struct Guard<F> {
    secret: Secret,
    admit: F,
    closed: Arc<AtomicBool>,
    strangers: Arc<AtomicUsize>,
}

impl<F: Fn(TcpStream) + Send + Sync + 'static> Guard<F> {
    fn stand(self: Arc<Self>, listener: &TcpListener) {
        let at_once = Arc::new(());
        loop {
            let connection = listener.accept();
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            let Ok((stream, _)) = connection else {
                // The system has no descriptors left, for now.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            if Arc::strong_count(&at_once) > MOST_AT_ONCE {
                continue;
            }
            let (guard, place) = (Arc::clone(&self), Arc::clone(&at_once));
            let look = move || {
                guard.look_at(stream);
                drop(place);
            };
            // Who cannot be looked at is not let in.
            let _ = std::thread::Builder::new().name("guest".into()).spawn(look);
        }
    }

    fn look_at(&self, stream: TcpStream) {
        match let_in(&stream, &self.secret) {
            Ok(()) => (self.admit)(stream),
            Err(_) => {
                self.strangers.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
