//! Snapshots between hosts: serves pieces of the parts that this host holds, pulls those that it lacks.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::network::serve::ChunkSource;
use crate::network::serve::SnapshotFiles;
use crate::platform::Platform;
use crate::store::snapshot::Part;
use crate::store::snapshot::SnapshotError;
use crate::store::snapshot::SnapshotHandle;
use crate::store::snapshot::Snapshots;

/// A part that arrived damaged is fetched again this often before the transfer gives up.
const DAMAGED_PARTS_MAX: u32 = 3;

pub struct SnapshotService {
    platform: Platform,
    snapshots: Arc<Snapshots>,
}

impl SnapshotService {
    pub fn new(platform: Platform, snapshots: Arc<Snapshots>) -> SnapshotService {
        SnapshotService { platform, snapshots }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, PullError> {
        match self.platform.on_disk(work).await {
            Some(Ok(value)) => Ok(value),
            Some(Err(SnapshotError::PartDamaged { part })) => Err(PullError::PartDamaged(part)),
            Some(Err(error)) => Err(PullError::Other(error.to_string())),
            None => Err(PullError::Other("this host is shutting down".to_owned())),
        }
    }

    async fn pull_parts(&self, manifest: &[u8], from: &dyn ChunkSource) -> Result<SnapshotHandle, PullError> {
        let (snapshots, manifest) = (self.snapshots.clone(), manifest.to_vec());
        let receiving = Arc::new(self.run(move || snapshots.receive(&manifest)).await?);
        let mut damaged_parts = 0;
        loop {
            let wants = receiving.clone();
            let Some((part, offset)) = self.run(move || wants.wants()).await? else { break };
            let piece = from.chunk(&part.name(), offset).await.map_err(PullError::Other)?;
            if piece.is_empty() {
                return Err(PullError::Other(format!("the other host no longer has {part}")));
            }
            let takes = receiving.clone();
            match self.run(move || takes.write(&part, offset, &piece)).await {
                Err(PullError::PartDamaged(_)) if damaged_parts < DAMAGED_PARTS_MAX => damaged_parts += 1,
                written => written?,
            }
        }
        self.run(move || receiving.finish()).await
    }
}

enum PullError {
    PartDamaged(String),
    Other(String),
}

impl From<PullError> for String {
    fn from(error: PullError) -> String {
        match error {
            PullError::PartDamaged(part) => format!("{part} arrived damaged each time"),
            PullError::Other(why) => why,
        }
    }
}

impl SnapshotFiles for SnapshotService {
    fn read(&self, file: String, offset: u64, len: u32) -> BoxFuture<'static, Result<Bytes, String>> {
        let (platform, snapshots) = (self.platform.clone(), self.snapshots.clone());
        Box::pin(async move {
            let part = Part::from_name(&file).ok_or_else(|| format!("{file} is not the name of a snapshot's part"))?;
            let read = platform.on_disk(move || snapshots.chunk(&part, offset, u64::from(len))).await;
            match read.ok_or("this host is shutting down")? {
                // A part that is gone is an empty piece: the transfer ends, and the next one offers a newer snapshot.
                Ok(piece) => Ok(Bytes::from(piece.unwrap_or_default())),
                Err(error) => Err(error.to_string()),
            }
        })
    }

    fn pull<'a>(
        &'a self,
        manifest: &'a [u8],
        from: &'a dyn ChunkSource,
    ) -> BoxFuture<'a, Result<SnapshotHandle, String>> {
        Box::pin(async move { self.pull_parts(manifest, from).await.map_err(String::from) })
    }
}
