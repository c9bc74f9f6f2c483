//! Shows what is in an area of KVM_GET_XSAVE2: the components in use with their places, MXCSR, and the
//! shapes of the tiles.
//!
//!     cargo run -p xsave-state --example look_into_an_area [FILE]
//!
//! FILE holds the bytes of an area, with the layout of Sapphire Rapids.
#![allow(
    clippy::indexing_slicing,
    reason = "the bytes are made up here, and have a known length"
)]

use std::error::Error;

use xsave_state::{Component, ComponentId, Image, Layout, Palette};

fn main() -> Result<(), Box<dyn Error>> {
    let layout = Layout::from_parts(
        [
            Component::user(ComponentId::AVX, 576, 256),
            Component::user(ComponentId::OPMASK, 1088, 64),
            Component::user(ComponentId::ZMM_HI256, 1152, 512),
            Component::user(ComponentId::HI16_ZMM, 1664, 1024),
            Component::user(ComponentId::PKRU, 2688, 8),
            Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
        ],
        [Palette::ONE],
    )?;
    let area = match std::env::args().nth(1) {
        Some(file) => std::fs::read(file)?,
        None => example(),
    };

    let image = Image::parse(&area, &layout)?;
    println!("in use  {}", image.xstate_bv());
    println!("MXCSR   {:#x}", image.mxcsr());
    for component in image.xstate_bv().components() {
        let Some(place) = layout.component(component) else {
            continue;
        };
        println!(
            "{:<10} {:>5} bytes at {}",
            component.to_string(),
            place.size(),
            place.offset().unwrap_or(0)
        );
    }
    if let Some(config) = image.tile_config() {
        for (tile, shape) in config.shapes().iter().enumerate() {
            println!(
                "tile {tile}: {} rows of {} bytes",
                shape.rows, shape.row_bytes
            );
        }
    }
    Ok(())
}

/// An area with SSE and one configured tile in use.
fn example() -> Vec<u8> {
    let mut area = vec![0; 11_008];
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&0x60002u64.to_le_bytes());
    let config = &mut area[2752..2816];
    (config[0], config[16], config[48]) = (1, 64, 16);
    area
}
