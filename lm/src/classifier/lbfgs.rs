//! [`minimise`]: limited-memory BFGS with a strong-Wolfe line search, after
//! Nocedal & Wright, *Numerical Optimization* (2nd ed.), algorithms 7.4, 7.5, 3.5 and 3.6.
//!
//! Knows no model: only a function of a vector and its gradient. Invariant: the point it returns
//! has a finite value that is not above the starting one.

use std::collections::VecDeque;

/// Past steps that model the curvature.
const MEMORY: usize = 10;
/// Share of the promised decrease that a step must bring (Armijo).
const DECREASE: f64 = 1e-4;
/// Share of the slope that may remain after a step (curvature).
const CURVATURE: f64 = 0.9;
/// Tries of one line search.
const TRIES: usize = 30;

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Steps at most.
    pub(super) steps: usize,
    /// Done when no component of the gradient is larger than this.
    pub(super) gradient: f64,
}

/// Where the search ended.
#[derive(Debug, Clone)]
pub(super) struct Minimum {
    /// The point.
    pub(super) x: Vec<f64>,
    /// The gradient was small enough (otherwise: out of steps, or no step improves).
    pub(super) converged: bool,
}

/// A point with its value and gradient.
#[derive(Clone)]
struct Point {
    x: Vec<f64>,
    value: f64,
    gradient: Vec<f64>,
}

/// One remembered step: move, change of gradient, 1 / their product.
struct Step {
    moved: Vec<f64>,
    bent: Vec<f64>,
    rho: f64,
}

/// Minimises `function`, which returns its value and writes its gradient, from `start`.
pub(super) fn minimise(
    start: Vec<f64>,
    limits: Limits,
    mut function: impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Minimum {
    let mut evaluate = |x: Vec<f64>| {
        let mut gradient = vec![0.0; x.len()];
        let value = function(&x, &mut gradient);
        Point { x, value, gradient }
    };
    let mut here = evaluate(start);
    let mut history: VecDeque<Step> = VecDeque::with_capacity(MEMORY);
    for _ in 0..limits.steps {
        if largest(&here.gradient) <= limits.gradient {
            return Minimum {
                x: here.x,
                converged: true,
            };
        }
        let direction = descent(&history, &here.gradient);
        // Without curvature a full step could be of any size: start with length one at most.
        let first = if history.is_empty() {
            (1.0 / norm(&here.gradient)).min(1.0)
        } else {
            1.0
        };
        match line_search(&here, &direction, first, &mut evaluate) {
            Some(next) => {
                remember(&mut history, &here, &next);
                here = next;
            }
            // The curvature may be out of date; steepest descent is the last resort.
            None if !history.is_empty() => history.clear(),
            None => break,
        }
    }
    Minimum {
        converged: largest(&here.gradient) <= limits.gradient,
        x: here.x,
    }
}

/// The two-loop recursion: minus the gradient, scaled by the remembered curvature.
fn descent(history: &VecDeque<Step>, gradient: &[f64]) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut alphas = Vec::with_capacity(history.len());
    for step in history.iter().rev() {
        let alpha = step.rho * dot(&step.moved, &q);
        add(&mut q, -alpha, &step.bent);
        alphas.push(alpha);
    }
    if let Some(last) = history.back() {
        let scale = 1.0 / (last.rho * dot(&last.bent, &last.bent));
        q.iter_mut().for_each(|v| *v *= scale);
    }
    for (step, alpha) in history.iter().zip(alphas.into_iter().rev()) {
        let beta = step.rho * dot(&step.bent, &q);
        add(&mut q, alpha - beta, &step.moved);
    }
    q
}

fn remember(history: &mut VecDeque<Step>, from: &Point, to: &Point) {
    let moved = difference(&to.x, &from.x);
    let bent = difference(&to.gradient, &from.gradient);
    let product = dot(&moved, &bent);
    // Positive by the curvature condition, but rounding may spoil a tiny step.
    if product > f64::EPSILON * dot(&bent, &bent) {
        if history.len() == MEMORY {
            history.pop_front();
        }
        history.push_back(Step {
            moved,
            bent,
            rho: 1.0 / product,
        });
    }
}

/// One end of the interval that holds a good step.
struct Bound {
    step: f64,
    value: f64,
    slope: f64,
}

/// A step along `direction` that meets the strong Wolfe conditions; failing that, the best one
/// that still decreases the value; `None` when there is none.
fn line_search(
    from: &Point,
    direction: &[f64],
    first: f64,
    evaluate: &mut impl FnMut(Vec<f64>) -> Point,
) -> Option<Point> {
    let slope = dot(&from.gradient, direction);
    if slope.is_nan() || slope >= 0.0 {
        return None;
    }
    let mut low = Bound {
        step: 0.0,
        value: from.value,
        slope,
    };
    let mut high: Option<Bound> = None;
    let mut step = first;
    let mut best: Option<Point> = None;
    for _ in 0..TRIES {
        let mut x = from.x.clone();
        add(&mut x, step, direction);
        let there = evaluate(x);
        let there_slope = dot(&there.gradient, direction);
        let bound = Bound {
            step,
            value: there.value,
            slope: there_slope,
        };
        let enough = there.value <= from.value + DECREASE * step * slope;
        if !there.value.is_finite() {
            high = Some(Bound {
                value: f64::INFINITY,
                ..bound
            });
        } else {
            if enough && there_slope.abs() <= -CURVATURE * slope {
                return Some(there);
            }
            if !enough || there.value >= low.value {
                high = Some(bound);
            } else {
                let away = high.as_ref().map_or(there_slope >= 0.0, |h| {
                    there_slope * (h.step - low.step) >= 0.0
                });
                let old = std::mem::replace(&mut low, bound);
                if away {
                    high = Some(old);
                }
                best = Some(there);
            }
        }
        step = match &high {
            Some(high) => between(&low, high),
            None => step * 2.0,
        };
    }
    best
}

/// The minimum of the cubic through both ends, kept away from them; else the middle.
fn between(low: &Bound, high: &Bound) -> f64 {
    let width = high.step - low.step;
    let d1 = low.slope + high.slope - 3.0 * (high.value - low.value) / width;
    let root = (d1 * d1 - low.slope * high.slope)
        .max(0.0)
        .sqrt()
        .copysign(width);
    let step = high.step - width * (high.slope + root - d1) / (high.slope - low.slope + 2.0 * root);
    let (near, far) = (low.step + 0.1 * width, low.step + 0.9 * width);
    if step.is_finite() {
        step.clamp(near.min(far), near.max(far))
    } else {
        low.step + 0.5 * width
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn largest(a: &[f64]) -> f64 {
    a.iter().fold(0.0, |m, v| v.abs().max(m))
}

fn add(to: &mut [f64], factor: f64, what: &[f64]) {
    to.iter_mut().zip(what).for_each(|(t, w)| *t += factor * w);
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| x - y).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_minimum_of_rosenbrock() {
        let limits = Limits {
            steps: 200,
            gradient: 1e-8,
        };
        let found = minimise(vec![-1.2, 1.0], limits, |x, g| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            g[0] = -2.0 * a - 400.0 * x[0] * b;
            g[1] = 200.0 * b;
            a * a + 100.0 * b * b
        });
        assert!(found.converged);
        assert!(
            (found.x[0] - 1.0).abs() < 1e-6 && (found.x[1] - 1.0).abs() < 1e-6,
            "{found:?}"
        );
    }

    #[test]
    fn a_badly_scaled_quadratic_converges() {
        let limits = Limits {
            steps: 500,
            gradient: 1e-5,
        };
        let found = minimise(vec![1.0; 20], limits, |x, g| {
            let mut value = 0.0;
            for (i, (x, g)) in x.iter().zip(g).enumerate() {
                let scale = 10f64.powf(i as f64 / 8.0);
                *g = scale * (x - i as f64);
                value += 0.5 * scale * (x - i as f64).powi(2);
            }
            value
        });
        assert!(found.converged, "{found:?}");
        assert!(
            found
                .x
                .iter()
                .enumerate()
                .all(|(i, x)| (x - i as f64).abs() < 1e-4)
        );
    }

    #[test]
    fn infinite_values_and_a_flat_start_do_not_trap_it() {
        let limits = Limits {
            steps: 100,
            gradient: 1e-6,
        };
        let found = minimise(vec![0.5], limits, |x, g| {
            // -ln x + x, infinite at and below 0.
            g[0] = 1.0 - 1.0 / x[0];
            if x[0] > 0.0 {
                x[0] - x[0].ln()
            } else {
                f64::INFINITY
            }
        });
        assert!((found.x[0] - 1.0).abs() < 1e-5);
        let flat = minimise(vec![3.0], limits, |_, g| {
            g[0] = 0.0;
            7.0
        });
        assert!(flat.converged && flat.x == [3.0]);
    }
}
