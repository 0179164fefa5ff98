//! Writes one metric with all its samples.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;

use crate::observe::counters::{BUCKET_BOUNDS_SECONDS, HistogramTotal};

pub(super) fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        if has_labels::<L>() {
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        } else {
            metric.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
    }
    Ok(())
}

pub(super) fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, f64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        if has_labels::<L>() {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        } else {
            metric.encode_gauge(&value)?;
        }
    }
    Ok(())
}

/// Leaves out histograms without an observation: 10,000 unused backends would make 400,000 lines.
pub(super) fn histograms<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, HistogramTotal)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for (labels, total) in samples {
        let count = total.buckets.iter().sum();
        if count == 0 {
            continue;
        }
        let bounds = BUCKET_BOUNDS_SECONDS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(total.buckets).collect();
        metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
            total.sum_seconds,
            count,
            &buckets,
            None,
        )?;
    }
    Ok(())
}

/// False for `[_; 0]`. Without this check the encoder would print `name{} 1` instead of `name 1`.
const fn has_labels<L>() -> bool {
    size_of::<L>() > 0
}
