//! What a host that does not lead sends to the leader: commands, many in one message ([`crate::node`] sends and serves them).

use serde::Deserialize;
use serde::Serialize;
use statemachine::codec;
use statemachine::codec::CodecError;
use statemachine::command::Request;

/// Commands of one message.
pub const TOGETHER: usize = 256;

/// One command as bytes: encoded once, by whoever has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct EncodedCommand(#[serde(with = "serde_bytes")] Vec<u8>);

impl EncodedCommand {
    pub fn of(request: &Request) -> EncodedCommand {
        EncodedCommand(codec::encode(request))
    }

    pub fn bytes(&self) -> usize {
        self.0.len()
    }
}

/// The message that carries these commands, in this order.
pub fn encode(commands: &[EncodedCommand]) -> Vec<u8> {
    codec::encode(&commands)
}

/// The commands of a message from a peer.
pub fn decode(body: &[u8]) -> Result<Vec<Request>, CodecError> {
    let commands: Vec<EncodedCommand> = codec::decode(body)?;
    if commands.len() > TOGETHER {
        return Err(CodecError::BadValue(format!("{} commands in a message that holds {TOGETHER}", commands.len())));
    }
    commands.iter().map(|command| codec::decode(&command.0)).collect()
}
