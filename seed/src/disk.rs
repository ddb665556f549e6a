//! Files as a FAT file system, which every Linux mounts and cloud-init looks for by its label.

use std::io;
use std::io::Cursor;
use std::io::Write;

use fatfs::Date;
use fatfs::DateTime;
use fatfs::FatType;
use fatfs::FileSystem;
use fatfs::FormatVolumeOptions;
use fatfs::FsOptions;
use fatfs::Time;
use fatfs::TimeProvider;

use crate::Seed;
use crate::documents::Document;

const LABEL: [u8; 11] = *b"CIDATA     ";
/// `CIDA`, and the same for every seed: guests know the disk by its label.
const VOLUME_ID: u32 = 0x4349_4441;

/// The first day that FAT can say. A time of making would make two images of one seed differ.
#[derive(Debug)]
struct NoTime;

static NO_TIME: NoTime = NoTime;

impl TimeProvider for NoTime {
    fn get_current_date(&self) -> Date {
        Date { year: 1980, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime { date: self.get_current_date(), time: Time { hour: 0, min: 0, sec: 0, millis: 0 } }
    }
}

/// Every parameter is written out: what the library prefers may change with its version, and the bytes may not.
pub fn image(documents: &[Document]) -> io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0; Seed::IMAGE_BYTES]);
    let layout = FormatVolumeOptions::new()
        .fat_type(FatType::Fat12)
        .bytes_per_sector(512)
        .bytes_per_cluster(512)
        .total_sectors((Seed::IMAGE_BYTES / 512) as u32)
        .max_root_dir_entries(64)
        .fats(2)
        .media(0xf8)
        .sectors_per_track(32)
        .heads(64)
        .drive_num(0x80)
        .volume_id(VOLUME_ID)
        .volume_label(LABEL);
    fatfs::format_volume(&mut disk, layout)?;
    let files = FileSystem::new(&mut disk, FsOptions::new().time_provider(&NO_TIME).update_accessed_date(false))?;
    for document in documents {
        let mut file = files.root_dir().create_file(document.name)?;
        file.write_all(&document.content)?;
        // A file that is dropped is written too, but says nothing of an error.
        file.flush()?;
    }
    files.unmount()?;
    Ok(disk.into_inner())
}
