{{/* Whether there is something that `helm test` can ask for. */}}
{{- define "onclock.loadTest" -}}
{{- if and .Values.loadTest.enabled .Values.loadTest.image.repository (or .Values.loadTest.model .Values.loadTest.scenario) }}true{{ end }}
{{- end }}

{{/* The scenario: the one that is given, or an even load on one model. What the chart knows (addresses, certificates, keys)
is filled in where the given one does not say it. */}}
{{- define "onclock.scenario" -}}
{{- $fullname := include "onclock.fullname" . -}}
{{- $scenario := dict "name" "helm-test" "server" (include "onclock.address" .) -}}
{{- /* Figures of the server itself; left out where they need a key or TLS. */ -}}
{{- if and .Values.metrics.enabled (not .Values.apiKeys.secretName) (not .Values.config.metrics_tls) -}}
{{- $_ := set $scenario "metrics" (printf "http://%s.%s.svc:%s/metrics" $fullname .Release.Namespace (include "onclock.text" .Values.service.metricsPort)) -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $tls := dict "ca" "/etc/loadtest-tls/ca.crt" "name" (default (printf "%s.%s.svc" $fullname .Release.Namespace) .Values.loadTest.tlsServerName) -}}
{{- if .Values.tls.clientCA.enabled -}}
{{- $_ := set $tls "certificate" "/etc/loadtest-tls/tls.crt" -}}
{{- $_ := set $tls "key" "/etc/loadtest-tls/tls.key" -}}
{{- end -}}
{{- $_ := set $scenario "tls" $tls -}}
{{- end -}}
{{- if .Values.loadTest.apiKey.secretName -}}
{{- $_ := set $scenario "metadata" (dict "authorization" "Bearer ${ONCLOCK_API_KEY}") -}}
{{- end -}}
{{- if .Values.loadTest.scenario -}}
{{- $scenario = merge (deepCopy .Values.loadTest.scenario) $scenario -}}
{{- else -}}
{{- $_ := set $scenario "description" "An even load on one model, from inside the cluster." -}}
{{- $_ := set $scenario "duration" .Values.loadTest.duration -}}
{{- $_ := set $scenario "slo" .Values.loadTest.slo -}}
{{- $_ := set $scenario "arrivals" (dict "kind" "poisson" "rate" .Values.loadTest.rate) -}}
{{- $_ := set $scenario "load" (list (dict "model" .Values.loadTest.model)) -}}
{{- $_ := set $scenario "pass" (dict "attainment" .Values.loadTest.attainment) -}}
{{- end -}}
{{ toYaml $scenario }}
{{- end }}
