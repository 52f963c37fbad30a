{{- define "strata.name" -}}
{{- printf "%s-operator" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "strata.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "strata.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* A digest says more than a tag. */ -}}
{{- define "strata.image" -}}
{{- .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end -}}
{{- end -}}

{{- define "strata.selector" -}}
app.kubernetes.io/name: strata-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "strata.labels" -}}
{{ include "strata.selector" . }}
app.kubernetes.io/part-of: strata
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- /* Where the pods of resources are, as a monitor's namespaceSelector. */ -}}
{{- define "strata.scrapedNamespaces" -}}
{{- if .Values.watchNamespace -}}
matchNames: [{{ .Values.watchNamespace }}]
{{- else -}}
any: true
{{- end -}}
{{- end -}}

{{- /* The additions as the operator's flag --accelerators reads them. */ -}}
{{- define "strata.accelerators" -}}
{{- $more := dict -}}
{{- with .Values.accelerators }}{{ $_ := set $more "accelerators" . }}{{ end -}}
{{- with .Values.pools }}{{ $_ := set $more "pools" . }}{{ end -}}
{{ toYaml $more }}
{{- end -}}
