// Renders Ollama templates the way Ollama's own package `template` hands data to text/template.
// Standard input: a JSON list of {"Template", "Data"}; standard output: a JSON list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content, Thinking string }

type data struct {
	System            string
	Messages          []*message
	Think, IsThinkSet bool
}

type request struct {
	Template string
	Data     data
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, one := range requests {
		parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
		if err != nil {
			panic(err.Error() + "\n" + one.Template)
		}
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{
			"System": one.Data.System, "Messages": one.Data.Messages, "Response": "",
			"Think": one.Data.Think, "IsThinkSet": one.Data.IsThinkSet,
		}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}
