//! Opens an image and what lies under it: the files that the configuration lists, each in its place, and no other.

use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use vmm_control::DiskFormat;

use super::header::{self, HEADER_REGION_BYTES, Header};
use super::storage::{ImageFile, ImageStorage};
use super::tables::{self, ReadAt};
use super::{Image, ImageError};

/// One file of a chain, open.
pub struct Layer {
    pub path: PathBuf,
    pub format: DiskFormat,
    pub file: Arc<ImageFile>,
    /// Device and inode: the file by another name is the same file.
    pub identity: Option<(u64, u64)>,
}

impl Layer {
    pub fn new(path: PathBuf, format: DiskFormat, file: std::fs::File, align: Option<usize>) -> Self {
        let identity = file.metadata().ok().map(|m| (m.dev(), m.ino()));
        let file = ImageFile::new(file, path.clone(), align);
        Self { path, format, file, identity }
    }

    fn failed(&self, source: std::io::Error) -> ImageError {
        ImageError::Read { path: self.path.clone(), source }
    }

    /// Reads and checks header and tables.
    fn header(&self) -> Result<Header, ImageError> {
        let bytes = self.file.bytes().map_err(|e| self.failed(e))?;
        let region = usize::try_from(bytes).unwrap_or(usize::MAX).min(HEADER_REGION_BYTES);
        let start = self.file.read_at(0, region).map_err(|e| self.failed(e))?;
        let header = header::parse(&self.path, &start, bytes)?;
        tables::check(&self.path, &header, &*self.file, bytes)?;
        Ok(header)
    }
}

/// Opens a chain. The first layer is the disk, and may be written unless `read_only`.
pub fn open(layers: Vec<Layer>, read_only: bool) -> Result<Image, ImageError> {
    let headers = check(&layers)?;
    let mut pairs = layers.iter().zip(&headers);
    let Some((top, Some(header))) = pairs.next() else {
        let path = layers.into_iter().next().map(|layer| layer.path).unwrap_or_default();
        return Err(ImageError::NotQcow2 { path });
    };
    let below: Vec<_> = pairs.collect();
    // From the far end, for each image takes the one below it along.
    let mut backing = None;
    for (layer, header) in below.into_iter().rev() {
        backing = Some(open_layer(layer, header.is_some(), false, backing)?);
    }
    let access = open_layer(top, true, !read_only, backing)?;
    let image = Image::new(access, Arc::clone(&top.file), header);
    if !read_only {
        // The library has rewritten the header if it had features that writing clears.
        top.file.sync().map_err(|e| top.failed(e))?;
    }
    Ok(image)
}

fn open_layer(
    layer: &Layer,
    is_qcow2: bool,
    write: bool,
    backing: Option<FormatAccess<ImageStorage>>,
) -> Result<FormatAccess<ImageStorage>, ImageError> {
    let storage = ImageStorage::new(Arc::clone(&layer.file));
    let opened = catch_unwind(AssertUnwindSafe(|| {
        if is_qcow2 {
            let builder = Qcow2::<ImageStorage>::builder(storage).write(write).backing(backing).data_file(None);
            builder.open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
        } else {
            let builder = Raw::builder(storage).write(write);
            builder.open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
        }
    }));
    match opened {
        Ok(Ok(access)) => Ok(access),
        Ok(Err(source)) => Err(ImageError::Open { path: layer.path.clone(), source }),
        Err(_) => {
            layer.file.fence();
            Err(ImageError::Panic { path: layer.path.clone() })
        }
    }
}

/// Checks each image by itself and against its neighbour below. A raw layer has no header.
fn check(layers: &[Layer]) -> Result<Vec<Option<Header>>, ImageError> {
    let mut identities = std::collections::BTreeSet::new();
    let mut headers = Vec::with_capacity(layers.len());
    for (at, layer) in layers.iter().enumerate() {
        if layer.identity.is_some_and(|identity| !identities.insert(identity)) {
            return Err(ImageError::Twice { path: layer.path.clone() });
        }
        headers.push(match layer.format {
            DiskFormat::Raw => None,
            DiskFormat::Qcow2 => {
                let header = layer.header()?;
                check_link(&layer.path, &header, layers.get(at + 1))?;
                Some(header)
            }
        });
    }
    Ok(headers)
}

/// Whether what an image says of its backing file is what the configuration says.
fn check_link(path: &Path, header: &Header, below: Option<&Layer>) -> Result<(), ImageError> {
    match (&header.backing_name, below) {
        (None, None) => Ok(()),
        (None, Some(below)) => Err(ImageError::NoBacking { path: path.to_owned(), surplus: below.path.clone() }),
        (Some(name), below) => {
            let is_listed = below.is_some_and(|below| names(path, name) == lexical(&below.path));
            if !is_listed {
                let expected = below.map_or("nothing".to_owned(), |below| below.path.display().to_string());
                return Err(ImageError::BackingName { path: path.to_owned(), name: name.clone(), expected });
            }
            match (&header.backing_format, below.map(|below| below.format)) {
                (Some(said), Some(configured)) if !is_called(configured, said) => {
                    Err(ImageError::BackingFormat { path: path.to_owned(), header: said.clone(), configured })
                }
                _ => Ok(()),
            }
        }
    }
}

fn is_called(format: DiskFormat, name: &str) -> bool {
    match format {
        DiskFormat::Raw => matches!(name, "raw" | "file" | "host_device"),
        DiskFormat::Qcow2 => name == "qcow2",
    }
}

/// The file that `name` means in the header of `image`. By the words alone: a name from an image is not even looked up.
fn names(image: &Path, name: &str) -> PathBuf {
    lexical(&image.parent().unwrap_or(Path::new("/")).join(name))
}

/// A path without `.` and `..`.
fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            part => clean.push(part),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_relative_to_its_image() {
        let image = Path::new("/vols/a/top.qcow2");
        for (name, path) in [
            ("base.qcow2", "/vols/a/base.qcow2"),
            ("./base.qcow2", "/vols/a/base.qcow2"),
            ("../b/base.qcow2", "/vols/b/base.qcow2"),
            ("/etc/shadow", "/etc/shadow"),
            ("../../../../../etc/shadow", "/etc/shadow"),
            ("nbd://host/export", "/vols/a/nbd:/host/export"),
            ("json:{\"driver\":\"host_device\"}", "/vols/a/json:{\"driver\":\"host_device\"}"),
        ] {
            assert_eq!(names(image, name), Path::new(path), "{name}");
        }
    }
}
