//! A TCP server of a scenario that runs in its own thread, since a proxy that starts blocks the scenario's
//! thread.

use std::future::Future;
use std::net::TcpListener as StdListener;
use std::thread::{JoinHandle, spawn};

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::watch;

/// A server whose behaviour follows a setting of type `T`, which the scenario changes. Dropping it ends it.
pub struct ThreadServer<T> {
    pub port: u16,
    /// `None` only while it is dropped.
    setting: Option<watch::Sender<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + Sync + 'static> ThreadServer<T> {
    /// Listens on a free port of 127.0.0.1 and runs `serve` for each connection.
    pub fn start<F>(setting: T, serve: impl Fn(TcpStream, watch::Receiver<T>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = StdListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let (setting, mut settings) = watch::channel(setting);
        let thread = spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                listener.set_nonblocking(true).expect("a socket");
                let listener = TcpListener::from_std(listener).expect("a socket");
                let connections = settings.clone();
                let accepting = async {
                    while let Ok((client, _)) = listener.accept().await {
                        tokio::spawn(serve(client, connections.clone()));
                    }
                };
                tokio::select! {
                    () = accepting => {}
                    // The wait fails when the server is dropped.
                    _ = settings.wait_for(|_| false) => {}
                }
            });
        });
        Self { port, setting: Some(setting), thread: Some(thread) }
    }

    pub fn set(&self, setting: T) {
        self.setting.as_ref().expect("it is not dropped").send_replace(setting);
    }
}

impl<T> Drop for ThreadServer<T> {
    fn drop(&mut self) {
        self.setting = None;
        if let Some(thread) = self.thread.take() {
            // If the thread panicked, it has printed why.
            let _ = thread.join();
        }
    }
}
