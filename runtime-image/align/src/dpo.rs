//! The loss of direct preference optimization (Rafailov et al. 2023).

/// Loss of a pair and its derivative by the log-likelihood of the chosen turn; that by the rejected turn is its negative.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Loss {
    pub(crate) value: f64,
    pub(crate) by_chosen: f64,
    /// Reward of the chosen turn minus that of the rejected one.
    pub(crate) margin: f64,
}

/// `-log sigmoid(beta · ((policy - reference of chosen) - (policy - reference of rejected)))`; likelihoods are (chosen,
/// rejected).
pub(crate) fn loss(beta: f64, policy: (f64, f64), reference: (f64, f64)) -> Loss {
    let margin = beta * ((policy.0 - reference.0) - (policy.1 - reference.1));
    // softplus(-margin), without overflow on either side.
    let value = (-margin).max(0.0) + (-margin.abs()).exp().ln_1p();
    let wrong = 1.0 / (1.0 + margin.exp());
    Loss {
        value,
        by_chosen: -beta * wrong,
        margin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_and_its_derivative_equal_pytorch() {
        // p = torch.tensor([-10., -12.], dtype=torch.float64, requires_grad=True)
        // l = -F.logsigmoid(0.1 * ((p[0] + 11.) - (p[1] + 9.))); l.backward()
        // margin = 0.1 · (1 − (−3)) = 0.4: l = ln(1 + e^−0.4) = 0.513015, dl/dp0 = −0.1 / (1 + e^0.4) = −0.0401312.
        let l = loss(0.1, (-10.0, -12.0), (-11.0, -9.0));
        assert!(
            (l.value - 0.513_015_3).abs() < 1e-6 && (l.by_chosen + 0.040_131_2).abs() < 1e-6,
            "{l:?}"
        );
        assert!((l.margin - 0.4).abs() < 1e-12);
        let at = |chosen: f64| loss(0.3, (chosen, -5.0), (-7.0, -5.5)).value;
        let slope = (at(-6.0 + 1e-5) - at(-6.0 - 1e-5)) / 2e-5;
        assert!((slope - loss(0.3, (-6.0, -5.0), (-7.0, -5.5)).by_chosen).abs() < 1e-8);
        for far in [-1e4, 1e4] {
            let l = loss(1.0, (far, 0.0), (0.0, 0.0));
            assert!(l.value.is_finite() && l.by_chosen.is_finite(), "{l:?}");
        }
    }
}
