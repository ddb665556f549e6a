//! One NBD connection: handshake, then requests until the client leaves or its host loses power.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, Semaphore, watch};

use super::Incarnation;
use super::export::{Export, Powered};
use super::proto::{self, Command, OptionKind, ReplyError, Request};
use crate::state::HostId;

type Exports = BTreeMap<&'static str, Arc<Export>>;
type Reader = BufReader<OwnedReadHalf>;

/// Requests that wait for a hanging disk, a connection. A virtio queue holds 256.
const MAX_WAITING: usize = 512;
/// Options a client may negotiate before it is sent away.
const MAX_OPTIONS: usize = 32;

/// The host as it was when it connected.
#[derive(Clone)]
struct Client {
    host: HostId,
    connected_as: Incarnation,
    incarnation: watch::Receiver<Incarnation>,
}

impl Powered for Client {
    fn is_powered(&self) -> bool {
        *self.incarnation.borrow() == self.connected_as
    }
}

pub async fn serve(
    host: HostId,
    stream: UnixStream,
    exports: Exports,
    mut incarnation: watch::Receiver<Incarnation>,
) -> Result<()> {
    let connected_as = *incarnation.borrow_and_update();
    let client = Client { host, connected_as, incarnation: incarnation.clone() };
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    let talk = async {
        match handshake(&mut reader, &mut writer, &exports).await? {
            Some(export) => transmission(client, export, reader, writer).await,
            None => Ok(()),
        }
    };
    tokio::select! {
        result = talk => result,
        _ = incarnation.changed() => Ok(()),
    }
}

/// Answers options until the client chooses an export (GO) or leaves.
async fn handshake(reader: &mut Reader, writer: &mut OwnedWriteHalf, exports: &Exports) -> Result<Option<Arc<Export>>> {
    writer.write_all(&proto::greeting()).await?;
    let mut flags = [0; 4];
    reader.read_exact(&mut flags).await?;
    proto::check_client_flags(flags)?;
    for _ in 0..MAX_OPTIONS {
        let mut header = [0; proto::OPTION_HEADER];
        reader.read_exact(&mut header).await?;
        let option = proto::parse_option_header(&header)?;
        let mut data = vec![0; option.length as usize];
        reader.read_exact(&mut data).await?;
        match option.kind {
            OptionKind::Abort => {
                writer.write_all(&proto::option_reply(option.raw, proto::REPLY_ACK, &[])).await?;
                return Ok(None);
            }
            OptionKind::Info | OptionKind::Go => {
                let found = proto::parse_export_name(&data).map(|name| exports.get(name));
                let Ok(Some(export)) = found else {
                    let error = if found.is_ok() { proto::ERROR_UNKNOWN } else { proto::ERROR_INVALID };
                    writer.write_all(&proto::option_reply(option.raw, error, b"no such export")).await?;
                    continue;
                };
                for information in proto::export_information(export.size()) {
                    writer.write_all(&proto::option_reply(option.raw, proto::REPLY_INFO, &information)).await?;
                }
                writer.write_all(&proto::option_reply(option.raw, proto::REPLY_ACK, &[])).await?;
                if option.kind == OptionKind::Go {
                    return Ok(Some(Arc::clone(export)));
                }
            }
            OptionKind::Other(_) => {
                writer.write_all(&proto::option_reply(option.raw, proto::ERROR_UNSUPPORTED, &[])).await?;
            }
        }
    }
    bail!("a client that negotiates {MAX_OPTIONS} options and chooses no export");
}

/// Serves requests. They are answered in order while the disk answers; when it hangs they wait
/// aside, so that the connection stays readable and reads after it heals are not behind writes.
async fn transmission(client: Client, export: Arc<Export>, mut reader: Reader, writer: OwnedWriteHalf) -> Result<()> {
    let writer = Arc::new(Mutex::new(writer));
    let waiting = Arc::new(Semaphore::new(MAX_WAITING));
    let mut waiters = tokio::task::JoinSet::new();
    loop {
        let mut header = [0; proto::REQUEST_HEADER];
        if let Err(error) = reader.read_exact(&mut header).await {
            // A client that closes between requests has simply gone (its emulator ended).
            return if error.kind() == std::io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(error.into()) };
        }
        let request = proto::parse_request(&header)?;
        if request.command == Command::Disconnect {
            return Ok(());
        }
        let mut data = Vec::new();
        if matches!(request.command, Command::Write { .. }) {
            data.resize(request.length as usize, 0);
            reader.read_exact(&mut data).await.context("the data of a write")?;
        }
        let data = Bytes::from(data);
        if !export.is_hung(client.host) {
            let reply = answer(&client, &export, request, &data);
            writer.lock().await.write_all(&reply).await?;
            continue;
        }
        let permit = Arc::clone(&waiting).acquire_owned().await?;
        let (client, export, writer) = (client.clone(), Arc::clone(&export), Arc::clone(&writer));
        while waiters.try_join_next().is_some() {}
        waiters.spawn(async move {
            export.until_it_answers(client.host).await;
            let reply = answer(&client, &export, request, &data);
            // When the client has gone meanwhile, its connection's loop sees that too.
            let _ = writer.lock().await.write_all(&reply).await;
            drop(permit);
        });
    }
}

fn answer(client: &Client, export: &Export, request: Request, data: &Bytes) -> Vec<u8> {
    match perform(client, export, request, data) {
        Ok(read) => [&proto::reply_header(request.cookie, None)[..], &read].concat(),
        Err(error) => proto::reply_header(request.cookie, Some(error)).to_vec(),
    }
}

fn perform(client: &Client, export: &Export, request: Request, data: &Bytes) -> Result<Vec<u8>, ReplyError> {
    let failed = |error: std::io::Error| {
        tracing::warn!(host = %client.host, ?request, %error, "disk request failed");
        ReplyError::Io
    };
    match request.command {
        Command::Read => {
            request.fits(export.size())?;
            export.read(client, request.offset, request.length as usize).map_err(failed)
        }
        Command::Write { force } => {
            request.fits(export.size())?;
            export.write(client.host, client, request.offset, data, force).map_err(failed)?;
            Ok(Vec::new())
        }
        Command::Flush => {
            export.flush(client.host, client).map_err(failed)?;
            Ok(Vec::new())
        }
        Command::Disconnect | Command::Other(_) => Err(ReplyError::Unsupported),
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
