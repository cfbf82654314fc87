// Python's ssl on the OpenSSL that Node brings.
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import test from 'ava'
import { begin, run, temporaryFolder } from './helpers/embedded.js'

const transport = `
import http.server, ssl, threading, urllib.request
body = bytes(range(256)) * 8192
def fetch(port, certificate):
    context = ssl.create_default_context(cafile=certificate)
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/", context=context, timeout=30) as answer:
        return [answer.status, answer.read() == body]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
def serve(certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
`

/** A key and a certificate that it signs itself, for 127.0.0.1 and a day; undefined without OpenSSL's program. */
function selfSigned(): { key: string; certificate: string } | undefined {
  const where = temporaryFolder()
  const [key, certificate] = [join(where, 'key.pem'), join(where, 'certificate.pem')]
  const request = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '1']
  const name = ['-subj', '/CN=epmoe test', '-addext', 'subjectAltName=IP:127.0.0.1']
  const made = spawnSync('openssl', [...request, ...name, '-keyout', key, '-out', certificate])
  return made.status === 0 ? { key, certificate } : undefined
}

test('Python and Node speak TLS with each other in one process, on one OpenSSL, either as the server', (t) => {
  const files = selfSigned()
  if (files === undefined) {
    t.log('not run: there is no openssl to make a certificate with')
    t.pass()
    return
  }
  const result = run(`${begin(transport)}
    const https = await import('node:https')
    const { once } = await import('node:events')
    const { readFileSync } = await import('node:fs')
    const { key, certificate } = ${JSON.stringify(files)}
    const [keyText, text] = [readFileSync(key), readFileSync(certificate)]
    const body = Buffer.concat(Array(8192).fill(Buffer.from(Array.from({ length: 256 }, (_, i) => i))))

    // Python asks on its executor; the event loop, which would otherwise stand still, answers.
    const seen = []
    const server = https.createServer({ key: keyText, cert: text }, (request, response) => {
      seen.push(request.socket.getProtocol())
      response.end(body)
    })
    await once(server.listen(0, '127.0.0.1'), 'listening')
    const { port } = server.address()
    const asked = []
    for (let i = 0; i < 5; i++) asked.push((await work.methodAsync('fetch', port, certificate)).toJS())
    const distrusted = await work.methodAsync('fetch', port, null).catch((error) => error)
    server.close()

    const pythons = work.method('serve', certificate, key)
    const fetch = (ca) => new Promise((resolve, reject) => {
      const request = https.get({ host: '127.0.0.1', port: pythons.get('server_port').toJS(), path: '/', ca, agent: false })
      request.on('error', reject)
      request.on('response', async (response) => {
        const protocol = response.socket.getProtocol()
        const chunks = []
        for await (const chunk of response) chunks.push(chunk)
        resolve([response.statusCode, Buffer.concat(chunks).equals(body), protocol])
      })
    })
    const answered = await Promise.all([1, 2, 3, 4, 5].map(() => fetch(text)))
    const doubted = await fetch().catch((error) => error)
    await pythons.methodAsync('shutdown')
    pythons.method('server_close')
    console.log(JSON.stringify({ asked, seen, distrusted: distrusted.pythonMessage, answered, doubted: doubted.code }))`) as Record<
    string,
    unknown
  >
  const five = (value: unknown) => Array(5).fill(value)
  t.deepEqual(result['asked'], five([200, true]))
  t.deepEqual(result['seen'], five('TLSv1.3'))
  t.deepEqual(result['answered'], five([200, true, 'TLSv1.3']))
  // The control: who is not told of the certificate takes nothing from its owner.
  t.regex(String(result['distrusted']), /CERTIFICATE_VERIFY_FAILED/)
  t.is(result['doubted'], 'DEPTH_ZERO_SELF_SIGNED_CERT')
})
