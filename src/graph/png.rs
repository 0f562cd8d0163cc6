//! The graph as a PNG picture: the SVG, drawn by `resvg` with fonts that are part of this program.

use std::sync::Arc;

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb};

use super::svg;
use super::view::GraphView;

/// Pixels of the picture for one of the drawing, where there is room.
const SCALE: f32 = 2.0;
/// Longest side, and most pixels.
const LONGEST: f32 = 16_000.0;
const PIXELS: f32 = 64_000_000.0;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PngError {
    /// The drawing is not as it should be.
    #[error("the drawing cannot be read: {0}")]
    Drawing(String),
    /// The picture is.
    #[error("the picture cannot be written: {0}")]
    Picture(String),
}

pub(super) fn render(view: &GraphView) -> Result<Vec<u8>, PngError> {
    let mut fonts = fontdb::Database::new();
    let mono = add_font(&mut fonts, epaint_default_fonts::HACK_REGULAR)?;
    let sans = add_font(&mut fonts, epaint_default_fonts::UBUNTU_LIGHT)?;
    fonts.set_monospace_family(mono);
    fonts.set_sans_serif_family(sans.clone());
    let options = Options {
        fontdb: Arc::new(fonts),
        font_family: sans,
        ..Options::default()
    };
    let tree = Tree::from_str(&svg::render(view), &options)
        .map_err(|e| PngError::Drawing(e.to_string()))?;
    let size = tree.size();
    let scale = SCALE
        .min(LONGEST / size.width().max(size.height()))
        .min((PIXELS / (size.width() * size.height())).sqrt());
    let pixels = |length: f32| (length * scale).ceil().max(1.0) as u32;
    let mut picture = Pixmap::new(pixels(size.width()), pixels(size.height()))
        .ok_or_else(|| PngError::Picture("it is too large".to_owned()))?;
    resvg::render(
        &tree,
        Transform::from_scale(scale, scale),
        &mut picture.as_mut(),
    );
    picture
        .encode_png()
        .map_err(|e| PngError::Picture(e.to_string()))
}

/// Adds a font; returns the name of its family.
fn add_font(fonts: &mut fontdb::Database, bytes: &'static [u8]) -> Result<String, PngError> {
    let ids = fonts.load_font_source(fontdb::Source::Binary(Arc::new(bytes)));
    let face = ids.first().and_then(|id| fonts.face(*id));
    let family = face.and_then(|face| face.families.first());
    family
        .map(|(name, _)| name.clone())
        .ok_or_else(|| PngError::Picture("a font cannot be read".to_owned()))
}
