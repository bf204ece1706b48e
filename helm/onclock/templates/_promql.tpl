{{/* Queries that several templates share. docs/kubernetes.md explains and checks the first one. */}}

{{/* Requests whose promise was broken, a second: answered late, refused, or failed in the model or on the device. What is
the client's own fault is in neither. Triton's counters are used where they say the same: they are there from the start,
with 0, so that the first failure counts, too. Arguments: root, range. */}}
{{- define "onclock.brokenRate" -}}
{{- $s := include "onclock.seriesSelector" (index . 0) -}}
{{- $range := index . 1 -}}
sum by (model) (rate(onclock_deadline_misses_total{ {{- $s -}} }[{{ $range }}]))
+ sum by (model) (rate(nv_inference_request_failure{ {{- $s }},reason=~"REJECTED|BACKEND"}[{{ $range }}]))
{{- end }}

{{/* Requests that a promise was made to, a second. Arguments: root, range. */}}
{{- define "onclock.offeredRate" -}}
{{- $s := include "onclock.seriesSelector" (index . 0) -}}
{{- $range := index . 1 -}}
sum by (model) (rate(nv_inference_request_success{ {{- $s -}} }[{{ $range }}]))
+ sum by (model) (rate(nv_inference_request_failure{ {{- $s }},reason=~"REJECTED|BACKEND"}[{{ $range }}]))
{{- end }}
