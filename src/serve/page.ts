/** The page at `/`: what the server does, live, and the switch between kernels. */
export const page = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>epmoe serve</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
  body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.3rem; }
  dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; }
  dt { opacity: .7; }
  dd { margin: 0; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
  button { font: inherit; padding: .3rem .8rem; }
  button[aria-pressed=true] { font-weight: bold; outline: 2px solid; }
  #bad { color: #c33; }
  canvas { width: 100%; height: 8rem; border-bottom: 1px solid; }
</style>
<h1>epmoe serve: <span id="model"></span></h1>
<p>Experts by
  <button data-mode="original">original</button>
  <button data-mode="shadow">shadow</button>
  <button data-mode="epmoe">epmoe</button>
  <span id="state">connecting</span>
</p>
<dl>
  <div><dt>running</dt><dd id="running"></dd></div>
  <div><dt>waiting</dt><dd id="waiting"></dd></div>
  <div><dt>requests done</dt><dd id="done"></dd></div>
  <div><dt>turned away</dt><dd id="refused"></dd></div>
  <div><dt>failed</dt><dd id="failed"></dd></div>
  <div><dt>cancelled</dt><dd id="cancelled"></dd></div>
  <div><dt>tokens a second</dt><dd id="rate"></dd></div>
  <div><dt>tokens written</dt><dd id="tokens"></dd></div>
  <div><dt>time in experts</dt><dd id="share"></dd></div>
</dl>
<canvas id="plot" width="960" height="128" aria-label="tokens a second over the last two minutes"></canvas>
<h1>Shadow: blocks compared</h1>
<dl>
  <div><dt>bit for bit the same</dt><dd id="identical"></dd></div>
  <div><dt>close</dt><dd id="close"></dd></div>
  <div><dt>worse</dt><dd id="worse"></dd></div>
  <div><dt>error, epmoe over original</dt><dd id="ratio"></dd></div>
</dl>
<p id="bad"></p>
<script>
  const at = (id) => document.getElementById(id)
  const buttons = [...document.querySelectorAll('button')]
  const rates = []
  for (const button of buttons) {
    button.onclick = async () => {
      const headers = { 'content-type': 'application/json' }
      const answer = await fetch('/mode', { method: 'PUT', headers, body: JSON.stringify({ mode: button.dataset.mode }) })
      at('bad').textContent = answer.ok ? '' : await answer.text()
    }
  }
  const source = new EventSource('/events')
  source.onerror = () => { at('state').textContent = 'not connected' }
  source.onmessage = ({ data }) => {
    const now = JSON.parse(data)
    at('state').textContent = now.state
    for (const id of ['model', 'running', 'waiting', 'tokens']) at(id).textContent = now[id]
    for (const id of ['done', 'refused', 'failed', 'cancelled']) at(id).textContent = now.requests[id]
    at('rate').textContent = now.rate.toFixed(1)
    at('share').textContent = (100 * now.share).toFixed(0) + ' %'
    for (const id of ['identical', 'close', 'worse']) at(id).textContent = now.shadow[id]
    at('ratio').textContent = now.ratio.toFixed(3)
    for (const button of buttons) button.setAttribute('aria-pressed', button.dataset.mode === now.mode)
    rates.push(now.rate)
    if (rates.length > 120) rates.shift()
    const plot = at('plot').getContext('2d')
    const top = Math.max(1, ...rates)
    plot.clearRect(0, 0, 960, 128)
    plot.fillStyle = getComputedStyle(document.body).color
    rates.forEach((rate, i) => plot.fillRect(i * 8, 128 - (120 * rate) / top, 6, (120 * rate) / top))
  }
</script>
</html>
`

/** Nothing but what is in the page itself, and talk with this server. */
export const pagePolicy =
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
