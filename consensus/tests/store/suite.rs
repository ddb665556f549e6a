//! openraft's own storage suite, over the real disk and over the one of the simulation.

use consensus::platform::Platform;
use consensus::store::Store;
use consensus::store::log_store::LogStore;
use consensus::store::state_machine::StateMachine;
use openraft::StorageError;
use openraft::testing::log::StoreBuilder;
use openraft::testing::log::Suite;

use crate::world::C;
use crate::world::World;

struct RealStores;

impl StoreBuilder<C, LogStore, StateMachine, tempfile::TempDir> for RealStores {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, StateMachine), StorageError<C>> {
        let dir = tempfile::tempdir().expect("a test folder");
        let store = Store::open(Platform::real(), dir.path()).await.expect("an empty folder opens");
        Ok((dir, store.log, store.state_machine))
    }
}

struct SimulatedStores;

impl StoreBuilder<C, LogStore, StateMachine, World> for SimulatedStores {
    async fn build(&self) -> Result<(World, LogStore, StateMachine), StorageError<C>> {
        let world = World::new();
        let store = world.open().await.expect("an empty disk opens");
        Ok((world, store.log, store.state_machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openraft_accepts_the_stores_on_a_real_disk() {
    Suite::test_all(RealStores).await.expect("every case of the suite passes");
}

#[tokio::test]
async fn openraft_accepts_the_stores_of_the_simulation() {
    Suite::test_all(SimulatedStores).await.expect("every case of the suite passes");
}
